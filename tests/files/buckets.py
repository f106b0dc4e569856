"""A bucket on the loopback: the few calls of Google's JSON protocol that are used.

Objects are held in memory, and several clients are served at once; `Bucket` is what
the tests see of it.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "bucket"


class Bucket(ThreadingHTTPServer):
  """The server, and its objects.

  Attributes:
    objects: content and generation, by name.
    environment: of the processes that are to find this bucket, and no other.
    broken: while set, nothing can be written.
  """

  daemon_threads = True

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.broken = threading.Event()
    self.lock = threading.Lock()
    self.uploads: dict[str, bytearray] = {}
    self.generation = 0
    self.url = f"http://127.0.0.1:{self.server_address[1]}"
    self.environment = {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
      "GOOGLE_CLOUD_PROJECT": "none",
      "GCE_METADATA_HOST": "127.0.0.1:1",
      "NO_GCE_CHECK": "true",
      # Asks a service that is not served here for the kind of bucket.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }

  def handle_error(self, request, client_address) -> None:
    """Nothing: a client was killed."""

  def names(self, prefix: str = "") -> list[str]:
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  def read(self, name: str) -> bytes:
    with self.lock:
      return self.objects[name][0]

  def put(self, name: str, content: bytes) -> None:
    with self.lock:
      self.generation += 1
      self.objects[name] = (content, self.generation)


@contextmanager
def served() -> Iterator[Bucket]:
  """A bucket, empty."""
  with Bucket() as made:
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    try:
      yield made
    finally:
      made.shutdown()
      thread.join()


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  # An answer goes out in one piece: otherwise each waits 40 ms for the other side.
  wbufsize = -1
  disable_nagle_algorithm = True
  server: Bucket

  def log_message(self, *args) -> None:
    pass

  def do_GET(self) -> None:
    self._take()
    if self.name is None and self.path.partition("?")[0].endswith("/o"):
      self._list()
    elif self.name is None:
      self._json({"kind": "storage#bucket", "name": NAME, "location": "HERE"})
    elif (found := self._found()) is None:
      self._say(404)
    elif self.query.get("alt") == "media":
      self._content(*found)
    else:
      self._json(self._about(self.name, *found))

  def do_POST(self) -> None:
    body = self._take()
    kind = self.query.get("uploadType")
    if self.server.broken.is_set():
      self._say(403)
    elif "upload_id" in self.query:
      self._append(body)
    elif kind == "media":
      self._put(self.query["name"], body)
    elif kind == "multipart":
      end = re.search('boundary="?([^"]+)"?', self.headers["Content-Type"])
      assert end is not None
      _, about, content, _ = body.split(b"--" + end[1].encode())
      about, content = (
        part.replace(b"\r\n", b"\n", 3).split(b"\n\n", 1)[1].removesuffix(b"\n")
        for part in (about, content)
      )
      self._put(json.loads(about)["name"], content)
    elif kind == "resumable":
      name = json.loads(body)["name"]
      self.server.uploads[name] = bytearray()
      place = f"{self.server.url}/upload/storage/v1/b/{NAME}/o?upload_id=1&name={name}"
      self._say(200, headers={"Location": place})
    else:
      self._say(501)

  do_PUT = do_POST

  def do_DELETE(self) -> None:
    self._take()
    with self.server.lock:
      gone = self.server.objects.pop(self.name, None)
    self._say(404 if gone is None else 204)

  def _take(self) -> bytes:
    """Reads the request; sets `query`, and `name`, the object's if there is one."""
    place = urlsplit(self.path)
    self.query = {k: v[0] for k, v in parse_qs(place.query).items()}
    match = re.search(r"/b/[^/]+/o/(.+)", place.path)
    self.name = unquote(match[1]) if match else None
    return self.rfile.read(int(self.headers.get("Content-Length") or 0))

  def _found(self) -> tuple[bytes, int] | None:
    with self.server.lock:
      return self.server.objects.get(self.name)

  def _put(self, name: str, content: bytes) -> None:
    wanted = self.query.get("ifGenerationMatch")
    with self.server.lock:
      there = self.server.objects.get(name, (b"", 0))[1]
    if wanted is not None and int(wanted) != there:
      self._say(412)
      return
    self.server.put(name, content)
    self._json(self._about(name, *self.server.objects[name]))

  def _append(self, body: bytes) -> None:
    """A piece of an object that is sent in several."""
    name = self.query["name"]
    self.server.uploads[name] += body
    if self.headers["Content-Range"].endswith("/*"):
      self._say(308, headers={"Range": f"bytes=0-{len(self.server.uploads[name]) - 1}"})
    else:
      self._put(name, bytes(self.server.uploads.pop(name)))

  def _list(self) -> None:
    prefix, end = self.query.get("prefix", ""), self.query.get("delimiter")
    items, prefixes = [], set()
    with self.server.lock:
      there = dict(self.server.objects)
    for name in sorted(n for n in there if n.startswith(prefix)):
      rest = name.removeprefix(prefix)
      if end and end in rest:
        prefixes.add(prefix + rest.partition(end)[0] + end)
      else:
        items.append(self._about(name, *there[name]))
    self._json({"items": items, "prefixes": sorted(prefixes)})

  def _about(self, name: str, content: bytes, generation: int) -> dict[str, str]:
    return {
      "kind": "storage#object",
      "bucket": NAME,
      "name": name,
      "size": str(len(content)),
      "generation": str(generation),
      "metageneration": "1",
      "updated": "2020-01-01T00:00:00.000Z",
      "timeCreated": "2020-01-01T00:00:00.000Z",
    }

  def _content(self, content: bytes, generation: int) -> None:
    if self.query.get("ifGenerationNotMatch") == str(generation):
      self._say(304)
      return
    headers = {"x-goog-generation": str(generation)}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if wanted is None:
      self._say(200, content, headers)
      return
    size, first = len(content), int(wanted[1])
    if first >= size:
      self._say(416)
      return
    last = min(int(wanted[2] or size), size - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    self._say(206, content[first : last + 1], headers)

  def _json(self, value: object) -> None:
    self._say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

  def _say(self, status: int, content: bytes = b"", headers=None) -> None:
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    if status not in (204, 304):
      self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)
    self.wfile.flush()
