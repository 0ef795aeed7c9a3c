"""Completion of settings and their values with the Tab key of bash.

    eval "$(python train/main.py -sc install=bash)"

The options are Hydra's. Its own script runs whatever script stands on the command line, to ask what
could follow; this one asks only commands of this kind, which answer before they start anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from conf.descriptions import Entry
from conf.errors import ConfigError, Problem

INSTALL = r"""
_phd_complete() {
    local line=${COMP_LINE:0:COMP_POINT} words current
    read -ra words <<<"$line"
    [[ ${words[1]} == *.py && -f ${words[1]} ]] || return
    grep -qE '(compose|arguments)\.run' "${words[1]}" || return
    current=
    [[ $line == *" " ]] || current=${words[-1]}
    mapfile -t COMPREPLY < <("${words[0]}" "${words[1]}" -sc query=bash "$current" 2>/dev/null)
    # What stands before the last sign that separates words is on the line already.
    [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#*=}")
    [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
}
complete -o default -F _phd_complete python python3
"""
UNINSTALL = "complete -r python python3; unset -f _phd_complete"


def completion(
    texts: Sequence[str], entries: Iterable[Entry], groups: Mapping[str, Sequence[str]]
) -> str | None:
    """What `-sc install=bash`, `-sc uninstall=bash` and bash's questions print.

    None if nothing of this is asked for.

    Raises:
        ConfigError: it is asked for another shell.
    """
    if texts and texts[-1] in FLAGS:
        texts = [*texts, ""]
    asked = next((value for flag, value in pairwise(texts) if flag in FLAGS), None)
    if asked is None:
        return None
    match asked.partition("="):
        case "install", _, "bash":
            return INSTALL
        case "uninstall", _, "bash":
            return UNINSTALL
        case "query", _, "bash":
            return "\n".join(candidates(texts[-1], entries, groups))
    expected = "expected install=bash, uninstall=bash or query=bash"
    raise ConfigError([Problem(f"-sc {asked}".strip(), expected=expected)], "the arguments")


FLAGS = ("-sc", "--shell-completion")


def candidates(
    word: str, entries: Iterable[Entry], groups: Mapping[str, Sequence[str]]
) -> list[str]:
    """What a word could become: one more level of a key, or a value.

    >>> known = [Entry("model.K", "", "", "", "", ()), Entry("eval.on", "", "", "", "", ("true",))]
    >>> for word in ("", "mo", "model.", "model=", "eval.on=t"):
    ...     print(candidates(word, known, {"model": ["phd", "vanilla"]}))
    ['eval.', 'model.', 'model=']
    ['model.', 'model=']
    ['model.K=']
    ['model=phd', 'model=vanilla']
    ['eval.on=true']
    """
    key, equals, _ = word.partition("=")
    if equals:
        values = [*groups.get(key, ())]
        values += [option for entry in entries if entry.is_for(key) for option in entry.options]
        found = [f"{key}={value}" for value in dict.fromkeys(values)]
    else:
        level = word.count(".")
        parts = [entry.key.split(".") for entry in entries if "*" not in entry.key]
        found = [f"{group}=" for group in groups if not level]
        found += [
            ".".join(part[: level + 1]) + ("." if len(part) > level + 1 else "=")
            for part in parts
            if len(part) > level
        ]
    return sorted({text for text in found if text.startswith(word)})
