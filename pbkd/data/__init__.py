"""Images: from their source into arrays, and from the arrays as the one stream of batches."""

from pbkd.data.batches import Batch, Stream
from pbkd.data.prepare import Prepared, Split, load_prepared, prepare

__all__ = ["Batch", "Prepared", "Split", "Stream", "load_prepared", "prepare"]
