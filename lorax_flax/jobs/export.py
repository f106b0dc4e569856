"""Export of what a run has trained: adapter/, or the full model/."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.merge import deferred
from lorax_flax.distributed import processes
from lorax_flax.hub.adapters import native
from lorax_flax.hub.checkpoints import export as hub_export
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.peft import soft as peft_soft
from lorax_flax.methods import Adapter, KernelDelta
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.tasks.task import Task

Result = Mapping[str, Any]
Form = Literal["peft", "orbax", "model"]


def form(adapter: Adapter, keymap: KeyMap) -> Form:
  """The form in which it is written.

  Args:
    keymap: of the base.
  """
  soft = [path for path in adapter if path not in keymap.keys]
  factored = any(isinstance(delta, KernelDelta) for delta in adapter.values())
  # Without either, an adapter would be the model all over.
  if not factored and not soft:
    return "model"
  if soft:
    return "peft" if peft_soft.has_form(adapter, keymap) else "orbax"
  # One of each class, which says what it becomes: tracing all takes a start 15 ms.
  kinds = {type(delta): delta for delta in adapter.values()}
  in_peft = jax.eval_shape(lambda ds: [d.in_peft() for d in ds], [*kinds.values()])
  return "orbax" if any(delta.peft is None for delta in in_peft) else "peft"


def export(
  config: LoraConfig,
  base_name: str,
  task: Task,
  loaded: registry.Loaded,
  card: Callable[[Result], str],
  prove: Callable[[Adapter], Mapping[str, Any]],
) -> Callable[[Adapter, Result, Path], dict[str, str]]:
  """The export of a run, as `lorax_flax.train.trials.Run` takes it.

  Args:
    base_name: name of the base in the adapter's config.
    card: (content of result.json) -> text of README.md.
    prove: (adapter) -> content of its provenance.json; every process calls it.
  """

  stored = registry.read_config(loaded.folder)
  resized = stored.get("vocab_size") != loaded.hf_config.get("vocab_size")

  def write_adapter(target: Path, adapter: Adapter, result: Result) -> None:
    tables = meshes.gather(loaded.params) if resized else None
    proof = prove(adapter)
    if not processes.first():
      return
    task_type = peft_config.TASK_TYPES[loaded.family.task]
    if form(adapter, loaded.keymap) == "orbax":
      saved = native.Saved(
        adapter,
        config,
        task_type=task_type,
        base_name=base_name,
        labels=None if task.labels is None else tuple(task.labels),
        problem_type=task.problem_type,
        untied=not loaded.keymap.ties,
        soft=loaded.soft,
      )
      native.write_adapter(target, saved, card(result), proof)
      return
    peft.write_adapter(
      target,
      adapter,
      loaded.keymap,
      config,
      base_name=base_name,
      labels=task.labels,
      problem_type=task.problem_type,
      task_type=task_type,
      params=tables,
      resized=resized,
      card=card(result),
      proof=proof,
    )

  def write_model(target: Path, adapter: Adapter, result: Result) -> None:
    merged = deferred(loaded.params, adapter)
    if not processes.first():
      for _ in hub_export.gathered(hub_export.leaves(merged, loaded.keymap)):
        pass  # Gathering a leaf takes all processes.
      return
    hub_export.write_checkpoint(
      target,
      merged,
      loaded.keymap,
      loaded.hf_config,
      architecture=loaded.family.architecture,
      labels=task.labels,
      problem_type=task.problem_type,
      base=loaded.folder,
      card=card(result),
      overwrite=True,
    )

  def write(adapter: Adapter, result: Result, workdir: Path) -> dict[str, str]:
    is_model = form(adapter, loaded.keymap) == "model"
    name, put = ("model", write_model) if is_model else ("adapter", write_adapter)
    put(workdir / name, adapter, result)
    return {name: str(workdir / name)}

  return write
