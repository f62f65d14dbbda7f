"""Keep the libraries that train from speaking for themselves, and from counting their users."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# bitsandbytes warns when it is imported, which PEFT does; the others log what we say in our own words.
TALKERS = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch.distributed", "trl")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, logs below errors, or Python warnings of other libraries inside the block.

    Changes global state of `logging`, `warnings`, transformers and datasets, and puts it back.
    """
    before = {name: logging.getLogger(name).level for name in TALKERS}
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import datasets
        from transformers.utils import logging as transformers_logging

        verbosity, bars = transformers_logging.get_verbosity(), datasets.are_progress_bars_disabled()
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if shown:
                transformers_logging.enable_progress_bar()
            if not bars:
                datasets.enable_progress_bars()
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
