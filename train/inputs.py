"""What a run reads from this machine, looked at before anything else is done."""

from pathlib import Path

from conf.errors import ConfigError, Problem
from conf.extras import not_installed
from data.config import FilesSource, Source, TokensSource
from train.config import Config


def check_inputs(config: Config) -> None:
    """Refuses data, weights and a tokenizer that are not where the settings say.

    What lies on other machines is asked for when the run is opened.

    Raises:
        ConfigError: paths do not exist, match no file, or hold something else.
        DataError: tokens are damaged or not finished, or weights to start from are not there.
        TransientError: a disk does not answer for now.
    """
    # These take a third of a second, which a misspelt setting does not have to wait for.
    from data.sources.documents import open_corpus
    from data.storage.shard_cache import ShardCache
    from data.tokenizer_training import given_tokenizer

    problems: list[Problem | str] = []
    cache = ShardCache(config.data.cache, config.data.remote)
    for name, source in config.data.sources.items():
        if not _is_here(source):
            continue
        try:
            open_corpus(name, source, config.data, cache)
        except ConfigError as error:
            problems += error.problems
    if config.tokenizer.path and not _has_tokenizer(config):
        try:
            given_tokenizer(config.tokenizer.path, config.model.vocab_size)
        except ConfigError as error:
            problems += error.problems
    if config.eval.tasks:
        problems += not_installed(
            "lm-eval", "phd-transformer[eval]", "eval.tasks", config.eval.tasks
        )
    if problems:
        raise ConfigError(problems)
    if _has_tokenizer(config):
        return
    if config.run.decay_of is not None:
        from train.start.trunk import check_trunk

        check_trunk(config)
    elif config.run.start_from is not None:
        from train.start.directory import kind_of

        kind_of(Path(config.run.start_from).expanduser())


def _is_here(source: Source) -> bool:
    """Whether all of a source is named by paths on this machine."""
    from data.storage.transport import is_local

    match source:
        case FilesSource():
            return all(map(is_local, source.patterns))
        case TokensSource():
            return True
    return False


def _has_tokenizer(config: Config) -> bool:
    """Whether the run was begun, with a tokenizer that it has kept a copy of."""
    return config.run.resume != "never" and Path(config.run_dir, "tokenizer.model").is_file()
