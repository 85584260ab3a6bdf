"""A local server for the part of the Hugging Face Hub's protocol that its clients use in these tests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Serves `root/models/<owner>/<name>/` and `root/datasets/<owner>/<name>/`. `requests` lists all requests."""

    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, []
        self.gated: set[str] = set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that point the clients to this hub and to a separate home."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(sent=sent)

    def _answer(self, *, body: bool = True, sent: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path)
        if not file and not api:
            return self._send(404, b"", {}, body)
        kind = ("datasets" if file[1] else "models") if file else api[1]
        repo = (file or api)[2]
        folder = self.hub.root / kind / repo
        if repo in self.hub.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if not folder.is_dir():
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if file:
            return self._file(folder / file[3], body)
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        listed = [self._entry(folder, name) for name in files]
        if api[3] == "tree":
            prefix = f"{api[5]}/" if api[5] else ""
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            below = [e for e in listed if e["path"].startswith(prefix)]
            here = [e for e in below if recursive or "/" not in e["path"].removeprefix(prefix)]
            inner = {prefix + e["path"].removeprefix(prefix).split("/")[0] for e in below if e not in here}
            return self._json(
                here + [{"type": "directory", "path": n, "oid": "0" * 40, "size": 0} for n in inner], body
            )
        if api[3] == "paths-info":
            paths = json.loads(sent)["paths"] if sent[:1] == b"{" else parse_qs(sent.decode())["paths"]
            entries = [e for e in listed if e["path"] in paths]
            folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
            return self._json(
                entries + [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in folders], body
            )
        info = {"_id": "0", "id": repo, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
        info |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files]}
        return self._json(info, body)

    def _entry(self, folder: Path, name: str) -> dict:
        size, sha256 = (folder / name).stat().st_size, _sha256(folder / name)
        return {
            "type": "file",
            "path": name,
            "size": size,
            "oid": sha256[:40],
            "lfs": {"oid": sha256, "size": size, "pointerSize": 130},
        }

    def _file(self, path: Path, body: bool) -> None:
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        content, headers = path.read_bytes(), {"ETag": f'"{_sha256(path)}"', "X-Repo-Commit": COMMIT}
        headers["X-Linked-Size"], headers["X-Linked-ETag"] = str(len(content)), headers["ETag"]
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if byte_range:
            first, last = int(byte_range[1]), int(byte_range[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], headers, body)
        return self._send(200, content, headers, body)

    def _json(self, value: object, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
