"""Sets made of random pixels, archives like those that are downloaded, and a host that serves them."""

from __future__ import annotations

import contextlib
import http.server
import io
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kdrefs.data import sources
from kdrefs.data.cache import Split, canonical_order

BLOCK = 1 << 16  # bytes that the host sends at once


def random_raw(
    seed: int = 0, train: int = 20, test: int = 8, size: int = 32, channels: int = 3
) -> sources.Raw:
    rng = np.random.default_rng(seed)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        return Split(images, rng.integers(0, 10, count, dtype=np.uint8))

    return sources.Raw(split(train), split(test), sources.CIFAR10_CLASSES)


def digests(raw: sources.Raw) -> dict[str, str]:
    return {k: canonical_order(s.images, s.labels)[1] for k, s in (("train", raw.train), ("test", raw.test))}


def write_tar(path: Path, members: dict[str, bytes], mode: int = 0o644) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    return path


def binary_archive(path: Path, raw: sources.Raw) -> Path:
    """An archive like CIFAR-10's binary version."""

    def records(split: Split) -> list[bytes]:
        planes = split.images.transpose(0, 3, 1, 2)
        return [bytes([y]) + x.tobytes() for x, y in zip(planes, split.labels, strict=True)]

    folder, train = "cifar-10-batches-bin", records(raw.train)
    fifth = len(train) // 5
    members = {
        f"{folder}/data_batch_{i + 1}.bin": b"".join(train[i * fifth : (i + 1) * fifth]) for i in range(5)
    }
    return write_tar(path, {**members, f"{folder}/test_batch.bin": b"".join(records(raw.test))})


@contextlib.contextmanager
def served(content: bytes, promised: int | None = None, pause: float = 0.0) -> Iterator[str]:
    """A host on this machine that sends ``content``, with pauses (seconds), and may promise more than that."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("missing"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(promised or len(content)))
            self.end_headers()
            for start in range(0, len(content), BLOCK):
                self.wfile.write(content[start : start + BLOCK])
                time.sleep(pause)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # seconds until it heeds the end
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/file.bin"
        finally:
            server.shutdown()
            thread.join()
