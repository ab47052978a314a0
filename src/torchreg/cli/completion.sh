# shellcheck shell=bash
# Completion for bash and zsh: put `eval "$(torchreg completion)"` in ~/.bashrc or ~/.zshrc.
# The words are those of the help of the command that is typed, which is asked for once in each shell.
[ -z "${ZSH_VERSION-}" ] || { autoload -U +X bashcompinit && bashcompinit; }
declare -A _torchreg_words
_torchreg() {
    local word command=""
    for word in "${COMP_WORDS[@]:1:$((COMP_CWORD - 1))}"; do
        [[ $word == -* ]] && break
        command+=" $word"
    done
    if [ -z "${_torchreg_words[torchreg$command]-}" ]; then
        # shellcheck disable=SC2086  # the words of the command
        _torchreg_words[torchreg$command]=$(COLUMNS=1000 torchreg $command --help 2>/dev/null |
            sed -nE 's/^  ([a-z-]+)  .*/\1/p; s/^│ (-h, )?(--[a-z-]+)(, (--[a-z-]+))?.*/\2 \4/p')
    fi
    # shellcheck disable=SC2207  # no word has a space
    COMPREPLY=($(compgen -W "${_torchreg_words[torchreg$command]}" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _torchreg torchreg
