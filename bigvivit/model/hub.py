"""A tower's folder: a local one, or one of the Hugging Face hub's, asked once and without minutes of retries."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of whichever HTTP library this version of the hub's client is built on
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0


def find_folder(name: str, patterns: list[str]) -> Path:
    """The local folder of a tower with the files of `patterns`, downloaded from the hub where it must be.

    A hub that cannot be asked is no error where its cache has the model. Raises ValueError.
    """
    if Path(name).is_dir():
        return Path(name)
    silence = why_silent(name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=silence is not None))
    except LocalEntryNotFoundError:
        raise ValueError(
            f"model.tower={name} is not in the hub's local cache, and {silence or 'the connection broke'}: "
            f"connect and run again, or download it elsewhere (`hf download {name}`) and give the folder"
        ) from None
    except (HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model.tower={name} could not be downloaded ({reason}): run again to go on") from None


@functools.cache
def why_silent(name: str) -> str | None:
    """Why the hub cannot be asked for this model; None where it answers. Raises ValueError for one it does not give.

    transformers would try six times for each file before it says so.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(name, timeout=ANSWER_SECONDS)
    except GatedRepoError:
        raise ValueError(
            f"model.tower={name} is given only to those who accepted its terms: do so on its page, then `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(
            f"model.tower={name} is neither a size, nor a local folder, nor a model of the Hugging Face hub: "
            f"check the name (`bigvivit towers` lists what is known); a private one needs `hf auth login`"
        ) from None
    except (HTTPError, OSError) as error:
        log.warning("the Hugging Face hub does not answer (%s): looking in its local cache", type(error).__name__)
        return f"the Hugging Face hub at {constants.ENDPOINT} does not answer"
    return None
