# fish completion for exoctl: exoctl completion fish | source

function __exoctl_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found (exoctl __complete -- $words[2..-1] "$current" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end

complete -c exoctl -f -a '(__exoctl_complete)'
