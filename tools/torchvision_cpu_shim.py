"""Make a CUDA build of torchvision importable beside a CPU build of torch.

The package index offers only a CUDA wheel of torchvision for Linux. Its compiled half cannot load
without CUDA, which torchvision forgives; but its Python half then describes two operators that only
the compiled half would have declared, and dies. Declaring them first is enough: everything written
in Python works (transforms, resizing), the compiled operators and image files stay out of reach.

`tools/setup_env.py` copies this module beside torchvision, with a path file that imports it when an
interpreter starts. It imports nothing until torchvision is imported, and does nothing for any other
pairing of builds. Remove it once the package index has a CPU wheel of torchvision.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in typing, which would be one import too many for every interpreter
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    import torch

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

declared: list[torch.library.Library] = []  # torch drops a declaration together with its library


class OperatorDeclarer:
    """Finds no module; takes the search for torchvision's loader of compiled code as its cue."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002
        /,
    ) -> ModuleSpec | None:
        """Declare the operators when torchvision is about to load its compiled half."""
        # Not on "torchvision" itself: asking whether it is installed must not import torch.
        if fullname == "torchvision.extension" and path:
            sys.meta_path.remove(self)
            declare_operators(path[0])
        return None


def declare_operators(torchvision: str) -> None:
    """Declare what the compiled half in this folder would have, if it is certain not to load."""
    from pathlib import Path

    import torch

    built_for_cuda = "+cu" in Path(torchvision, "version.py").read_text(encoding="utf-8")
    if torch.version.cuda is None and built_for_cuda:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(name + SIGNATURE)
        declared.append(library)


sys.meta_path.insert(0, OperatorDeclarer())
