"""All that the programs import, some of it only as they go: in the process that they are forked from, it is there."""

import importlib

for name in (
    "tests.drill.places",
    "concurrent.futures.process",
    "safetensors.torch",
    "torch._dynamo",  # with the first optimiser
    "reproductions.harness.claims",
    "reproductions.harness.recording",
    "reproductions.harness.report",
    "reproductions.harness.runs",
):
    importlib.import_module(name)
