"""Checks an adapter's numbers without torch: finite, and with an effect."""

from pathlib import Path

import numpy as np

from adapters.adapter import AdapterManifest
from adapters.errors import AdapterRefused, AdapterUnavailable
