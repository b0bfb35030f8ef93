"""State that a model carries from one update to the next: of a recurrent network over consecutive windows of text."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from seqba.context import current_batch, current_copies, current_rows
from seqba.repeat import unfold


class CarriedState:
    """Hidden states, one block of B rows for each copy of each batch of an update.

    M copies of B streams need M*B states, and a copy finds its own again whichever pass computes it. It belongs to the
    update as generators and buffers do: `TrainStep(..., carried=[state])` takes back what an attempt kept that ran out
    of memory, and a checkpoint holds it.

        def loss_fn(model, rows):
            output, hidden = model(rows["input_ids"], state.take(len(rows["input_ids"])))
            state.keep(hidden)
            ...

    Args:
        initial: number of rows -> the state before the first window: a tensor or a nesting of tuples, lists and
            dictionaries of tensors, with the rows along `dim` of each.
        dim: 1 for `nn.LSTM`, whose states are (layers, rows, width).

    Attributes:
        copies: of this rank, which a loaded state is cut to; None keeps all. `TrainStep` sets it.

    >>> state = CarriedState(lambda rows: torch.zeros(rows, 2), dim=0)
    >>> from seqba import copies_of_pass
    >>> with copies_of_pass((0, 1)):
    ...     state.keep(state.take(4) + torch.arange(4).unsqueeze(1))
    >>> with copies_of_pass((1,)):
    ...     state.take(2).tolist()
    [[2.0, 2.0], [3.0, 3.0]]
    """

    def __init__(self, initial: Callable[[int], Any], *, dim: int = 1) -> None:
        self.initial, self.dim = initial, dim
        self.copies: tuple[int, ...] | None = None
        self._blocks: dict[tuple[int, int], Any] = {}  # (batch, copy) -> B rows; replaced, never written into
        self._loaded = False  # whether all copies of all batches have a block

    def take(self, num_rows: int) -> Any:
        """The state of the running pass's rows: what `keep` was given for its copies, or the initial one.

        Raises:
            RuntimeError: no pass is running.
            ValueError: another number of rows a copy than before; or only some of the copies have a state, or of a
                loaded state none.
        """
        places = self._places()
        missing = [copy for batch, copy in places if (batch, copy) not in self._blocks]
        if len(missing) == len(places) and not self._loaded:
            return self.initial(num_rows)
        if missing:
            raise ValueError(
                f"no state was carried over for copies {missing} of batch {places[0][0]}, but for other copies; "
                "continue with the num_copies, ranks and batches an update that the state is of, or `reset` it"
            )
        blocks = [tree_flatten(self._blocks[place]) for place in places]
        joined = [torch.cat(leaves, self.dim) for leaves in zip(*(leaves for leaves, _ in blocks), strict=True)]
        if (rows := current_rows()) is not None:
            joined = [leaf.index_select(self.dim, rows.to(leaf.device)) for leaf in joined]
        for leaf in joined:
            if leaf.shape[self.dim] != num_rows:
                raise ValueError(
                    f"the pass has {num_rows} rows, but {leaf.shape[self.dim]} were carried over for its copies; give "
                    "every update batches of the same size, or `reset` the state before another size begins"
                )
        return tree_unflatten(joined, blocks[0][1])

    def keep(self, state: Any) -> None:
        """Carry the state of the running pass's rows on, detached from its graph; not of a part of its batch.

        Raises:
            RuntimeError: no pass is running.
            ValueError: another structure than `initial` makes, or rows that the copies do not divide.
        """
        places = self._places()
        found, structure = tree_flatten(state)[1], tree_flatten(self.initial(1))[1]
        if found != structure:
            raise ValueError(f"the state to carry is built as {found}, but the initial one as {structure}")
        if current_rows() is not None:
            return
        for i, place in enumerate(places):
            self._blocks[place] = tree_map(lambda x, i=i: unfold(x.detach(), len(places), dim=self.dim)[i], state)

    def reset(self) -> None:
        """Begin again from the initial state, as at an epoch's start."""
        self._blocks.clear()
        self._loaded = False

    def snapshot(self) -> Callable[[], None]:
        """Remember the state as it is; the function returned puts it back."""
        blocks = dict(self._blocks)

        def restore() -> None:
            self._blocks = dict(blocks)

        return restore

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by batch, copy and place in the state; each rank has its own."""
        return {
            f"{batch}.{copy}.{i}": leaf
            for (batch, copy), block in self._blocks.items()
            for i, leaf in enumerate(tree_flatten(block)[0])
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: the state has another structure than `initial` makes, or tensors of other sizes.
        """
        own, structure = tree_flatten(self.initial(1))
        leaves: dict[tuple[int, int], dict[int, Tensor]] = {}
        for name, leaf in state.items():
            batch, copy, i = map(int, name.split("."))
            leaves.setdefault((batch, copy), {})[i] = leaf
        for found in leaves.values():
            if sorted(found) != list(range(structure.num_leaves)):
                raise ValueError(
                    f"the carried state holds {len(found)} tensors a copy, but the model's has {structure.num_leaves}"
                )
            for i, leaf in enumerate(own):
                want = (*leaf.shape[: self.dim], *leaf.shape[self.dim + 1 :])
                got = (*found[i].shape[: self.dim], *found[i].shape[self.dim + 1 :])
                if got != want:
                    raise ValueError(
                        f"the carried state's tensor {i} has the sizes {got} beside its rows, but the model's {want}"
                    )
        self._blocks = {
            place: tree_unflatten([found[i] for i in sorted(found)], structure)
            for place, found in leaves.items()
            if self.copies is None or place[1] in self.copies
        }
        self._loaded = bool(self._blocks)

    def _places(self) -> list[tuple[int, int]]:
        copies, batch = current_copies(), current_batch()
        if copies is None or batch is None:
            raise RuntimeError("no pass is running: state is carried between the passes of updates")
        return [(batch, copy) for copy in copies]
