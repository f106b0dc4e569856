"""Jinja as chat templates are written for it.

Source: transformers' utils/chat_template_utils.py, which templates are tested with.
"""

import contextvars
import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import exceptions, ext, meta, nodes, sandbox, utils

from lorax_flax.errors import LoraxError

Span = tuple[int, int]


class _Trace:
  """Text that is rendered so far, and the spans of its `{% generation %}` blocks."""

  def __init__(self) -> None:
    self.length = 0
    self.blocks: list[tuple[int, str]] = []


_trace: contextvars.ContextVar[_Trace | None] = contextvars.ContextVar(
  "trace", default=None
)


class _Generation(ext.Extension):
  """`{% generation %}…{% endgeneration %}`: a part that the model is to produce."""

  tags: set[str] = {"generation"}  # noqa: RUF012 (of the base class)

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

  def _block(self, caller: Callable[[], str]) -> str:
    text = caller()
    if (trace := _trace.get()) is not None:
      trace.blocks.append((trace.length, text))
    return text


class _Refusal(jinja2.TemplateError):
  """The error that a template raises itself."""


class _Dict:
  """`dict` without the attributes of a Python class."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict[Any, Any]:
    return dict.fromkeys(*args)


class _Namespace(utils.Namespace):
  """A namespace without underscored names, which reach into Python."""

  def __init__(*args: Any, **kwargs: Any) -> None:
    # No named parameter, since `namespace(self=1)` is a template's right.
    values = dict(*args[1:], **kwargs)
    for name in values:
      _check_name(name)
    utils.Namespace.__init__(args[0], values)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise exceptions.SecurityError(f"a namespace's {name!r} starts with an underscore")


def _raise_exception(message: str) -> None:
  raise _Refusal(message)


def _strftime_now(format: str) -> str:
  return datetime.datetime.now().strftime(format)


def _tojson(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  # Jinja's own escapes HTML.
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _make_environment() -> sandbox.ImmutableSandboxedEnvironment:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
  )
  environment.filters["tojson"] = _tojson
  environment.globals |= {
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
    "dict": _Dict(),
    "namespace": _Namespace,
  }
  return environment


_environment = _make_environment()


@functools.lru_cache
def compile_template(text: str) -> jinja2.Template:
  """Compiles a template, once.

  Raises:
    LoraxError: its text is no template.
  """
  try:
    return _environment.from_string(text)
  except jinja2.TemplateSyntaxError as error:
    raise LoraxError(f"line {error.lineno}: {error.message}") from error


@functools.lru_cache
def has_generation(text: str) -> bool:
  """True where the template marks what the model is to produce."""
  return _environment.parse(text).find(nodes.ExtensionAttribute) is not None


@functools.lru_cache
def variables(text: str) -> frozenset[str]:
  """Names that a template takes from outside."""
  return frozenset(meta.find_undeclared_variables(_environment.parse(text)))


def render(text: str, values: Mapping[str, Any]) -> str:
  """Renders a template.

  Raises:
    LoraxError: the template raises, or can't use the values.
  """
  return _guarded(lambda: compile_template(text).render(values))


def render_marked(text: str, values: Mapping[str, Any]) -> tuple[str, list[Span]]:
  """Renders a template that marks what the model is to produce.

  Returns:
    The text, and the spans of characters that are marked.

  Raises:
    LoraxError: as `render`; or a mark in a part that the template keeps and prints
      elsewhere, whose place is not known.
  """
  trace = _Trace()

  def generate() -> str:
    pieces = []
    for piece in compile_template(text).generate(values):
      pieces.append(piece)
      trace.length += len(piece)
    return "".join(pieces)

  token = _trace.set(trace)
  try:
    rendered = _guarded(generate)
  finally:
    _trace.reset(token)
  for start, block in trace.blocks:
    if not rendered.startswith(block, start):
      raise LoraxError(
        "the template has {% generation %} inside a macro or a {% set %} block, so that"
        " its place in the chat isn't known: move it to where the text is printed"
      )
  return rendered, [(start, start + len(block)) for start, block in trace.blocks]


def _guarded(generate: Callable[[], str]) -> str:
  try:
    return generate()
  except _Refusal as error:
    raise LoraxError(f"the chat template refuses it: {error}") from error
  # A template is a program, and can fail in any way.
  except Exception as error:
    kind = (
      "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    )
    raise LoraxError(f"the chat template fails: {kind}{error}") from error
