"""Saving and pushing adapters and merged models with their card: one commit, private unless asked otherwise.

`PeftModel.push_to_hub` and `PreTrainedModel.push_to_hub` overwrite a folder's README.md with the repository's, or with
an empty one. The functions here upload the folder as it is; later pushes by those methods then keep the card.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import __version__
from .adapter.model import AsymGQAModel
from .card import TRANSPORT_ERRORS, Conversion, base_licence, check_repo_id, checked_token, model_card
from .files import check_replaceable, folder_beside, save_json
from .published import check_files

# What an earlier push may have left, and a loader would find beside or instead of the new files.
_SUPERSEDED = [
    "config.json",
    "adapter_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
]


def push_adapter_to_hub(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase | None, repo_id: str, **options: object
) -> str:
    """Push the active adapter, with its card, in one commit; returns the repository's URL.

    Args:
        model: the wrapped model.
        tokenizer: saved along, if given.
        repo_id: "owner/name" of the repository, made if it does not exist.
        **options: those of `save_adapter`, and
            private: whether a new repository is private (default); an existing public one is then refused.
            exist_ok: whether to replace what an existing repository holds; default is no.
            token: of the Hub; default is the one logged in with.

    Raises:
        ValueError: for a model without AsymGQA adapter, a base that others cannot load, a bad or taken repository
            id, or a missing or refused token; nothing was pushed then.
        ConnectionError: if the Hub could not be reached or the push was interrupted; the repository then shows all
            of the push or nothing.
    """
    return _push(save_adapter, model, tokenizer, repo_id, **options)


def push_merged_to_hub(
    plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, repo_id: str, **options: object
) -> str:
    """Push a merged model, with its card, in one commit; returns the repository's URL.

    Arguments and errors are those of `push_adapter_to_hub`, with the options of `save_merged`. The temporary folder
    ($TMPDIR) needs free space for the model.
    """
    return _push(save_merged, plain, tokenizer, repo_id, **options)


def _push(
    save: Callable[..., None],
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    repo_id: str,
    private: bool = True,
    exist_ok: bool = False,
    token: str | None = None,
    **options: object,
) -> str:
    check_push_target(repo_id, private=private, exist_ok=exist_ok, token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, folder, name=repo_id, token=token, **options)
        return push_folder(folder, repo_id, private=private, exist_ok=exist_ok, token=token)


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    name: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
    **card: object,
) -> None:
    """Save the active adapter with tokenizer and card, ready to be pushed.

    Args:
        model: the wrapped model.
        tokenizer: saved along, if given.
        folder: a new or empty one; it is written whole or not at all.
        name: in the card; default is the folder's.
        base_model: "owner/name" of the base, needed if the model was not loaded from the Hub.
        token: of the Hub, for the licence of the base.
        **card: `report`, `evaluation`, `calibration_data`, `recovery_data`, see `model_card`.

    Raises:
        ValueError: for a model without AsymGQA adapter, a base without a name on the Hub, or a folder in use.
    """
    folder = _checked_empty(folder)
    conversion = Conversion.of(model, base_model)
    if conversion.plain is not None:
        raise ValueError(f"This {type(model).__name__} is merged and has no adapter any more: use save_merged.")
    licence = base_licence(conversion.base_source, conversion.base_revision, token)
    text = model_card(conversion, name=name or folder.name, licence=licence, **card)
    adapter_name = model.active_adapter
    with folder_beside(folder) as beside:
        model.save_pretrained(str(beside), selected_adapters=[adapter_name])
        # PEFT puts any other adapter into a folder of its own, where no loader looks on the Hub.
        if adapter_name != "default":
            for file in (beside / adapter_name).iterdir():
                file.replace(beside / file.name)
            (beside / adapter_name).rmdir()
        name_base(beside / "adapter_config.json", conversion)
        _save_tokenizer(tokenizer, beside)
        write_card(beside, text)


def save_merged(
    plain: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    conversion: Conversion | None = None,
    *,
    name: str | None = None,
    token: str | None = None,
    max_shard_size: int | str = "5GB",
    duplicate_kv_heads: bool = False,
    cached_tokens: int | None = None,
    **card: object,
) -> None:
    """Save a merged model with its tokenizer, generation configuration, chat template and card.

    Weights go to disk file by file, without a copy of the model. A wrapped model is merged as it is written, a decoder
    layer at a time, and stays as it is: of a base that accelerate offloads, to disk or to main memory, no more than a
    layer and a file is held.

    Args:
        plain: what `merge_and_unload` returned, or a wrapped model, whose active adapter is merged.
        tokenizer, folder, name, token, **card: as for `save_adapter`.
        conversion: what the card tells of the base. It is what the model remembers; one that was loaded from a file
            needs that of `Conversion.from_configs`.
        max_shard_size: as for `save_pretrained`.
        duplicate_kv_heads, cached_tokens: of a wrapped model, as for `merge_and_unload`.

    Raises:
        ValueError: for a model that does not remember its base, or a folder in use; of a wrapped model also what
            `merge_and_unload` refuses.
    """
    folder, tuner = _checked_empty(folder), getattr(plain, "base_model", None)
    if isinstance(tuner, AsymGQAModel):
        layout = {"duplicate_kv_heads": duplicate_kv_heads, "cached_tokens": cached_tokens}
        plain = tuner.plain_model_to_save(plain.active_adapter, **layout)
    elif isinstance(plain, PeftModel) or not isinstance(plain, PreTrainedModel):
        raise ValueError(f"{type(plain).__name__} is not a merged model: pass what model.merge_and_unload() returns.")
    elif duplicate_kv_heads or cached_tokens is not None:
        raise ValueError(
            "duplicate_kv_heads and cached_tokens come too late, the model is merged: pass a wrapped one."
        )
    conversion = replace(conversion or Conversion.of(plain), plain=plain.config)
    licence = base_licence(conversion.base_source, conversion.base_revision, token)
    text = model_card(conversion, name=name or folder.name, licence=licence, **card)
    with folder_beside(folder) as beside:
        with warnings.catch_warnings():
            # That a file has to fit into memory.
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            plain.save_pretrained(str(beside), max_shard_size=max_shard_size)
        _save_tokenizer(tokenizer, beside)
        write_card(beside, text)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    if tokenizer is None:
        return
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # transformers 5 calls the class of a bare tokenizer.json so, and loads the older name as the same; converters of
    # engines still pin transformers 4, which knows only that.
    if config.get("tokenizer_class") == "TokenizersBackend":
        save_json(file, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def check_push_target(
    repo_id: str, *, private: bool = True, exist_ok: bool = False, token: str | None = None
) -> list[str]:
    """Find out before any work whether a push can succeed; arguments and errors as for `push_adapter_to_hub`.

    Returns:
        Names of the files that the repository holds already.
    """
    check_repo_id(repo_id)
    with _clear_errors(repo_id):
        try:
            info = _api(token).model_info(repo_id)
        except RepositoryNotFoundError:
            return []
    files = [sibling.rfilename for sibling in info.siblings or []]
    if private and not info.private:
        raise ValueError(
            f"repo_id={repo_id!r} exists and is public: pass private=False to push to it, or make it private first."
        )
    # What an interrupted first push left, an empty repository, counts as new.
    if not exist_ok and set(files) - {".gitattributes"}:
        raise ValueError(f"repo_id={repo_id!r} exists and has files: pass exist_ok=True to replace them.")
    return files


def push_folder(
    folder: Path | str, repo_id: str, *, private: bool = True, exist_ok: bool = False, token: str | None = None
) -> str:
    """Upload a saved model in one commit, which also removes what would shadow it; returns the repository's URL.

    Arguments and errors: as for `push_adapter_to_hub`; also ValueError for files that `check_files` refuses, a folder
    without weights, and an adapter whose base is not on the Hub.
    """
    folder, api = Path(folder), _api(token)
    names = _names_to_upload(folder)
    existing = check_push_target(repo_id, private=private, exist_ok=exist_ok, token=token)
    if "adapter_config.json" in names:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        with _clear_errors(str(base)):
            known = bool(base) and api.repo_exists(base)
        if not known:
            raise ValueError(
                f"The adapter's base {base!r} is not on the Hub, or not for this token: nobody could load the "
                "adapter. Pass base_model='owner/name', or push the merged model."
            )
    operations = [CommitOperationAdd(name, str(folder / name)) for name in names]
    for name in filter_repo_objects(sorted(set(existing) - set(names)), allow_patterns=_SUPERSEDED):
        operations.append(CommitOperationDelete(name))
    with _clear_errors(repo_id):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        # Not upload_folder: huggingface_hub 2 spreads a large folder over several commits.
        api.create_commit(repo_id, operations, commit_message=f"Upload with asymgqa_peft {__version__}")
    return str(url)


def name_base(config_file: Path, conversion: Conversion) -> None:
    """Write the base's repository into a saved `adapter_config.json`; ValueError if the base is on no Hub."""
    if conversion.base_model is None:
        raise ValueError(
            f"The adapter's base is {conversion.base_source!r}, which is not a repository on the "
            "Hub: nobody else could load the adapter. Pass base_model='owner/name', or push the merged model."
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    save_json(config_file, config | {"base_model_name_or_path": conversion.base_model})


def write_card(folder: Path | str, text: str) -> None:
    """Write README.md, over whatever a save_pretrained left there."""
    ModelCard(text).save(Path(folder, "README.md"))


def _checked_empty(folder: Path | str) -> Path:
    folder = Path(folder)
    check_replaceable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r} holds something already: remove it or choose another folder.")
    return folder


def _api(token: str | None) -> HfApi:
    token = checked_token(token) or get_token()
    if not token:
        raise ValueError(
            "No token for the Hub: run `hf auth login`, set HF_TOKEN, or pass token= (one with write access)."
        )
    return HfApi(token=checked_token(token))


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """Tell a refused token (ValueError) from a connection that broke (ConnectionError), with the remedy for each."""
    try:
        yield
    except TRANSPORT_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise ValueError(
                f"The Hub refused the token for repo_id={repo_id!r} ({status}): use one that may write there."
            ) from error
        raise ConnectionError(
            f"The push to {repo_id} did not complete: {error}\nAll files go in one commit, so nothing of it is "
            "visible unless all is. Push again; should that find the repository filled, it had arrived."
        ) from error


def _names_to_upload(folder: Path) -> list[str]:
    """Every file in a folder but hidden ones, by its name in the repository."""
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is not a folder.")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    files = [path.relative_to(folder).as_posix() for path in paths]
    names = list(filter_repo_objects(files, ignore_patterns=[".*", "*/.*"]))
    check_files(folder, names)
    if not list(filter_repo_objects(names, allow_patterns="*.safetensors")):
        raise ValueError(f"folder={str(folder)!r} holds no safetensors weights: save a model there first.")
    return names
