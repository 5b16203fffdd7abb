"""Where the trained small model lies that comes with Rayseek: `model/small/`, official layout.

Its README is the model card: what it can and cannot do, and how it was trained.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "small"
