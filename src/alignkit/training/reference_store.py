"""The reference's log-probabilities, computed once: for all epochs, for all jobs of a sweep, for the next run.

A reference does not change while the policy is trained, and neither does what it says of a pair. One SQLite file in
write-ahead mode, which several processes may use at once. What is computed is on disk after each batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from alignkit.core.database import open_database
from alignkit.core.errors import UserError
from alignkit.core.ranks import is_main
from alignkit.training.log_probs import Answer, answer_log_probs

if TYPE_CHECKING:
    from peft import PeftModel

FORMAT = 1
"""Part of every key; goes up when the same tokens would get another value."""

SAMPLED_WEIGHTS = 256
"""Of each matrix of the base that are looked at to tell it from others: a fine-tuned base differs nearly everywhere."""

_QUERY_KEYS = 500


class ReferenceStore:
    """Log-probabilities, in nats, by key. Use as a context manager; raises `UserError` when the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ReferenceStore:
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = open_database(self.path)
            self._database.execute("CREATE TABLE IF NOT EXISTS log_probs (key BLOB PRIMARY KEY, value REAL NOT NULL)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """What is there of these keys."""
        found: dict[bytes, float] = {}
        for start in range(0, len(keys), _QUERY_KEYS):
            some = keys[start : start + _QUERY_KEYS]
            places = ", ".join("?" * len(some))
            with self._explained():
                found.update(
                    self._database.execute(f"SELECT key, value FROM log_probs WHERE key IN ({places})", some).fetchall()
                )
        return found

    def put(self, values: Mapping[bytes, float]) -> None:
        """Keep values that are not there yet: all of them or, after a kill, none.

        What is there stays, so that a run that continues reads what it began with, whoever else has computed it since.
        """
        with self._explained(), self._database:  # which commits, or rolls back
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR IGNORE INTO log_probs VALUES (?, ?)", list(values.items()))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"reference_store={self.path}: {error}. Free space, name another file, or delete this one: it only "
                "saves time."
            ) from error


def reference_log_probs(
    trainer: DPOTrainer, answers: Sequence[Answer], path: Path | None
) -> tuple[list[float], dict[str, int]]:
    """log p_reference(answer | prompt) of each, in nats; and how many of them were stored, and how many computed now.

    The reference is the trainer's: its adapter "ref" or, without one, the base. Equal answers are computed once. Only
    the main process touches the file at `path`; None: nothing is kept. Where another run has stored a value in the
    meantime, that one counts: two computations differ by their rounding, and all runs must go on from the same.
    """
    policy: Any = trainer.model
    adapter = "ref" if "ref" in policy.peft_config else None
    model_key = "" if path is None else reference_key(policy, adapter, trainer.accelerator.mixed_precision)
    keys = [answer_key(model_key, answer) for answer in answers]
    distinct = dict(zip(keys, answers, strict=True))
    with _opened(path) as store:
        known = [store.get(list(distinct)) if store is not None else {}]
        broadcast_object_list(known)
        values = known[0]
        missing = [key for key in distinct if key not in values]
        counts = {"stored": len(values), "computed": len(missing)}

        def keep(new: Mapping[int, float]) -> None:
            if store is not None:
                store.put({missing[place]: value for place, value in new.items() if math.isfinite(value)})

        with use_adapter(policy, adapter):
            computed = answer_log_probs(trainer, [distinct[key] for key in missing], "reference log-probs", keep)
        kept = [store.get(missing) if store is not None else {}]
        broadcast_object_list(kept)
        values |= dict(zip(missing, computed, strict=True)) | kept[0]
    return [values[key] for key in keys], counts


@contextmanager
def _opened(path: Path | None) -> Iterator[ReferenceStore | None]:
    if path is None or not is_main():
        yield None
        return
    with ReferenceStore(path) as store:
        yield store


# -- keys --------------------------------------------------------------------------------------------------------------


def answer_key(model_key: str, answer: Answer) -> bytes:
    """A hash of the model, the tokens (which hold the template), and where the answer begins."""
    return hashlib.sha256(json.dumps([model_key, *answer]).encode()).digest()


def reference_key(policy: PeftModel, adapter: str | None, precision: str) -> str:
    """A hash of all that decides what the reference says: base, adapter, and the arithmetic they run in.

    Of the base every matrix is sampled, of the adapter (None: no adapter) every weight counts. `precision` is that of
    autocast. The same weights in another dtype, in 4 bits, with another attention or on another kind of device are
    another reference: their log-probabilities differ by their rounding. So are those with positions scaled for another
    context (YaRN), which config.json alone says.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    base: Any = policy.get_base_model()
    digest = hashlib.sha256()
    shape = base.config.get_text_config()
    facts = [FORMAT, str(policy.dtype), precision, base.config._attn_implementation, policy.device.type]
    facts += [getattr(shape, name, None) for name in ("rope_parameters", "sliding_window")]  # no weights show these
    if adapter is not None:
        scales = {
            name: module.scaling[adapter]
            for name, module in policy.named_modules()
            if isinstance(module, LoraLayer) and adapter in module.scaling
        }
        facts.append(sorted(scales.items()))
        weights = get_peft_model_state_dict(policy, adapter_name=adapter, save_embedding_layers=False)
        for name, weight in sorted(weights.items()):
            _add(digest, name, weight)
    digest.update(json.dumps(facts).encode())
    for name, weight in base.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            _add(digest, name.replace(".base_layer", ""), weight, SAMPLED_WEIGHTS)
    return digest.hexdigest()


def _add(digest: Any, name: str, weight: torch.Tensor, sampled: int | None = None) -> None:
    """Let a digest take in a tensor: its name, shape and dtype, and all of its weights or about so many of them."""
    digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\0".encode())
    step = max(1, weight.numel() // sampled) if sampled else 1
    digest.update(weight.data.reshape(-1)[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
