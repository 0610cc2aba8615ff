#compdef exoctl
# zsh completion for exoctl: source <(exoctl completion zsh), or a file `_exoctl` in $fpath

_exoctl() {
    local -a found
    local word text
    while IFS=$'\t' read -r word text; do
        found+=("${word//:/\\:}${text:+:$text}")
    done < <(exoctl __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)
    if (( $#found )); then
        _describe 'exoctl' found
    else
        _files
    fi
}

if [ "$funcstack[1]" = "_exoctl" ]; then
    _exoctl "$@"
else
    compdef _exoctl exoctl
fi
