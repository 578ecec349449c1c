"""Reading models that others made: files looked at first, every weight accounted for, errors of one sentence.

* `errors`: what a loader may raise.
* `files`: the files of a local folder.
* `hub`: whether the hub can be reached.
* `weights`: models of diffusers and transformers.
* `single_file`: a base in one `.safetensors` file.
"""

from __future__ import annotations

from lorainit_diffusers.loading.errors import BrokenModelError, MissingModelError

__all__ = ["BrokenModelError", "MissingModelError"]
