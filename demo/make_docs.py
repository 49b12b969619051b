"""``make docs``: the help pages and the README's method table."""

from __future__ import annotations

from evaluate import import_comfy, import_pack

import_comfy()
import_pack()

from quickstep.nodes import docs, entry  # noqa: E402

docs.main([node for module in entry.MODULES for node in module.NODES])
