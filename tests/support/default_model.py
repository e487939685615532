"""Where is the model that tests of a real front end or engine use?"""

from __future__ import annotations

import os

from kvrelay.models import default_cache_dir, resolve_model


def default_model_path() -> str:
    """The default model's folder, prepared if need be."""
    return resolve_model("", default_cache_dir(dict(os.environ))).path
