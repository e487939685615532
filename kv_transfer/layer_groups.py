"""Which layers can be saved now, while the forward pass computes later ones?"""

from __future__ import annotations

from collections.abc import Iterable

NO_LAYERS = range(0)


class LayerGroups:
    """Follows one forward pass after the other; every layer is given out once in each, neighbours together.

    Only layers that come in their order are given out early: when they do not, `rest` has them.
    """

    def __init__(self, layer_names: Iterable[str], num_groups: int) -> None:
        """`num_groups` of equal size, the last one smaller; 1 gives out everything at the end."""
        self._index = {name: index for index, name in enumerate(layer_names)}
        self._num_layers = len(self._index)
        self._group_size = -(-self._num_layers // num_groups)
        self._num_computed = 0
        self._num_given = 0

    def begin(self) -> None:
        """A forward pass starts."""
        self._num_computed = self._num_given = 0

    def computed(self, layer_name: str) -> range:
        """The layer has its KV. Returns the layers of a group that is complete with it, or none."""
        if self._group_size == self._num_layers or self._index.get(layer_name) != self._num_computed:
            return NO_LAYERS
        self._num_computed += 1
        if self._num_computed % self._group_size and self._num_computed < self._num_layers:
            return NO_LAYERS
        return self._give(self._num_computed)

    def rest(self) -> range:
        """The forward pass is over: everything that was not given out."""
        return self._give(self._num_layers)

    def _give(self, end: int) -> range:
        layers = range(self._num_given, end)
        self._num_given = end
        return layers
