"""Image sets with content digests, and batches of them made on the device."""

from kdrefs.data.batches import Augment, Batch, Batches
from kdrefs.data.cache import DataError, ImageSet, Split, cache_root
from kdrefs.data.composites import composite_set, composites
from kdrefs.data.sets import SetInfo, is_cached, load_set, set_info, set_names

__all__ = [
    "Augment",
    "Batch",
    "Batches",
    "DataError",
    "ImageSet",
    "SetInfo",
    "Split",
    "cache_root",
    "composite_set",
    "composites",
    "is_cached",
    "load_set",
    "set_info",
    "set_names",
]
