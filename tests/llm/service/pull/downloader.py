"""A process that pulls one whole model and prints where it lies: to be killed in the middle of it."""

import sys
from pathlib import Path

import trio

from meshnode.llm.service.pull import fetch
from tests.llm.service.weights.world import world


async def main(folder: Path, url: str) -> None:
    fetch.WRITE_BYTES, fetch.SYNC_BYTES = 100_000, 300_000
    async with world(folder) as w:
        node = await w.add()
        await node.pull(url, whole=True)
        manifest = node.weights.manifests()[0]
        print(await node.stage(manifest, 0, manifest.layers))


trio.run(main, Path(sys.argv[1]), sys.argv[2])
