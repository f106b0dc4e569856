"""What a run writes of what it has trained."""

from collections.abc import Callable
from pathlib import Path

import lorax_flax as lx
from lorax_flax.distributed import processes
from lorax_flax.hub.adapters import native
from lorax_flax.hub.checkpoints import export as hub_export
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import folder as peft
from lorax_flax.jobs.settings import Settings
from lorax_flax.methods import Adapter, KernelDelta
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.tasks.task import Kind


def export(
  wanted: Settings, kind: Kind, loaded: registry.Loaded
) -> Callable[[Adapter, Path], dict[str, str]]:
  """Makes what `lorax_flax.train.loop.Job` asks for: adapter/, or the whole model/."""

  def write_adapter(target: Path, adapter: Adapter) -> None:
    if not processes.first():
      return
    task_type = peft_config.TASK_TYPES[loaded.family.task]
    if any(delta.peft is None for delta in adapter.values()):
      saved = native.Saved(
        adapter,
        wanted.lora,
        task_type=task_type,
        base_name=wanted.model.path,
        labels=None if kind.labels is None else tuple(kind.labels),
      )
      native.write_adapter(target, saved)
      return
    peft.write_adapter(
      target,
      adapter,
      loaded.keymap,
      wanted.lora,
      base_name=wanted.model.path,
      labels=kind.labels,
      task_type=task_type,
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
      labels=kind.labels,
      tokenizer_from=loaded.folder,
      may_replace=lambda old: (old / "config.json").is_file(),
    )

  def write(adapter: Adapter, workdir: Path) -> dict[str, str]:
    # Without deltas of kernels, an adapter would be the model all over.
    has_deltas = any(isinstance(delta, KernelDelta) for delta in adapter.values())
    name, put = ("adapter", write_adapter) if has_deltas else ("model", write_model)
    put(workdir / name, adapter)
    return {name: str(workdir / name)}

  return write
