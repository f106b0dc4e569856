"""Export of what a run has trained: adapter/, or the full model/."""

from collections.abc import Callable
from pathlib import Path

import lorax_flax as lx
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.distributed import processes
from lorax_flax.hub.adapters import native
from lorax_flax.hub.checkpoints import export as hub_export
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import folder as peft
from lorax_flax.methods import Adapter, KernelDelta
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.tasks.task import Task


def export(
  config: LoraConfig, base_name: str, task: Task, loaded: registry.Loaded
) -> Callable[[Adapter, Path], dict[str, str]]:
  """The export of a run, as `lorax_flax.train.trials.Run` takes it.

  Args:
    base_name: name of the base in the adapter's config.
  """

  stored = registry.read_config(loaded.folder)
  resized = stored.get("vocab_size") != loaded.hf_config.get("vocab_size")

  def write_adapter(target: Path, adapter: Adapter) -> None:
    tables = meshes.gather(loaded.params) if resized else None
    if not processes.first():
      return
    task_type = peft_config.TASK_TYPES[loaded.family.task]
    if any(delta.peft is None for delta in adapter.values()):
      saved = native.Saved(
        adapter,
        config,
        task_type=task_type,
        base_name=base_name,
        labels=None if task.labels is None else tuple(task.labels),
        problem_type=task.problem_type,
        untied=not loaded.keymap.ties,
      )
      native.write_adapter(target, saved)
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
    )

  def write_model(target: Path, adapter: Adapter) -> None:
    merged = meshes.gather(lx.merge(loaded.params, adapter))
    if not processes.first():
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
      overwrite=True,
    )

  def write(adapter: Adapter, workdir: Path) -> dict[str, str]:
    # Without deltas of kernels, an adapter would be the model all over.
    has_deltas = any(isinstance(delta, KernelDelta) for delta in adapter.values())
    name, put = ("adapter", write_adapter) if has_deltas else ("model", write_model)
    put(workdir / name, adapter)
    return {name: str(workdir / name)}

  return write
