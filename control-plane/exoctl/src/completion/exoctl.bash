# bash completion for exoctl: source <(exoctl completion bash)

_exoctl() {
    local IFS=$'\n' word="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    # The shell splits words at `=`; what is completed then is what follows it.
    local line
    while IFS=$'\t' read -r line _; do
        [[ $word == "=" || $COMP_CWORD -gt 0 && ${COMP_WORDS[COMP_CWORD-1]} == "=" ]] && line="${line#*=}"
        COMPREPLY+=("$line")
    done < <(exoctl __complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == */ ]] && compopt -o nospace
    return 0
}

complete -o bashdefault -o default -F _exoctl exoctl
