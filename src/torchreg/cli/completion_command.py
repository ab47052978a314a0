"""`torchreg completion`: the commands and their options, as their help shows them, in a script for bash and zsh."""

from __future__ import annotations

import contextlib
import io
import os
import re

from torchreg.cli import COMMANDS, main
from torchreg.cli.options import EXAMPLES

_SCRIPT = """\
# In ~/.bashrc or ~/.zshrc: eval "$(torchreg completion)"
[ -z "${ZSH_VERSION-}" ] || { autoload -U +X bashcompinit && bashcompinit; }
_torchreg() {
    local words
    case "${COMP_WORDS[*]:1:COMP_CWORD}" in
    CASES) words="COMMANDS" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _torchreg torchreg
"""


def run(argv: list[str]) -> int:
    """Print the script."""
    if argv:
        raise ValueError(f"completion takes no options, and got {argv[0]!r}")
    cases = ""
    os.environ["COLUMNS"] = "1000"  # one line for each option
    for command in sorted(EXAMPLES, reverse=True):  # `report compare` before `report`
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        options = re.findall(r"(?:^\W*|, )(--[a-z-]+)", shown.getvalue(), re.MULTILINE)
        cases += f'"{command} "*) words="{" ".join(dict.fromkeys(options))}" ;;\n    '
    print(_SCRIPT.replace("CASES", f"{cases}*").replace("COMMANDS", " ".join(COMMANDS)), end="")
    return 0
