"""The states of a session by name: what each is, and copies of what it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .device import HostArray, numpy_dtype
from .errors import StateError
from .manifest import Manifest, StateSpec
from .state import state_shape

if TYPE_CHECKING:
    from .session import Session

_DLPACK_CPU = (1, 0)


class StateView:
    """One state of a session, as it is whenever it is asked.

    `numpy.asarray(view)`, `torch.from_dlpack(view)` and the like get a copy of their own on the host; to write, use
    `Session.set_state`.

    Attributes:
        name: ONNX name of the past input.
        output: ONNX name of the present output.
        kind: `recurrent` | `conv` | `kv_cache`.
        dtype: numpy name, or `bfloat16`.
    """

    def __init__(self, session: Session, spec: StateSpec, read: Callable[[StateSpec], HostArray]) -> None:
        self._session = session
        self._read = read
        self._spec = spec
        self.name, self.output, self.kind, self.dtype = spec.name, spec.output, spec.kind, spec.dtype

    def __repr__(self) -> str:
        shape = "batch still open" if self._session.batch is None else str(list(self.shape))
        return f"StateView({self.name!r}, {self.kind}, {self.dtype}, {shape}, on {self.device})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in ONNX form: a KV cache has as many rows as there are tokens, whatever its capacity.

        Raises:
            StateError: The batch is open until the first call.
        """
        batch = self._session.batch
        if batch is None:
            raise StateError("the batch is open until the first call", hint="use program.session(batch=B)")
        return state_shape(self._session.program.manifest, self._spec, batch, self._session.position)

    @property
    def nbytes(self) -> int:
        """Bytes of this shape; a KV cache takes its whole capacity on the device."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    @property
    def device(self) -> str:
        """URI of the device that it is on."""
        return self._session.program.device.uri

    def numpy(self) -> HostArray:
        """A copy on the host, read from the device anew every time.

        Raises:
            StateError: The batch is open until the first call, the program is closed, or a call is under way.
        """
        return self._read(self._spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> HostArray:
        """What `numpy.asarray` asks for."""
        if copy is False:
            raise ValueError("a state is on a device: only a copy of it can be had")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, **options: Any) -> Any:
        """What `from_dlpack` asks for: a capsule of a copy on the host.

        Raises:
            StateError: DLPack's numpy has no such dtype.
        """
        try:
            return self.numpy().__dlpack__(**options)
        except BufferError as error:
            hint = "use numpy()"
            raise StateError("DLPack cannot have it", where=self.name, got=self.dtype, hint=hint) from error

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where the capsule's memory is: on the host."""
        return _DLPACK_CPU


class StateViews(Mapping[str, StateView]):
    """All states of a session, by the name of the past input; that of the present output is found too."""

    def __init__(self, session: Session, read: Callable[[StateSpec], HostArray]) -> None:
        self._session = session
        self._read = read
        self._manifest: Manifest = session.program.manifest

    def __repr__(self) -> str:
        return f"StateViews({', '.join(map(repr, self.values()))})"

    def __getitem__(self, name: str) -> StateView:
        """One state.

        Raises:
            StateError: There is none of this name; the message lists them.
        """
        return StateView(self._session, find_state(self._manifest, name), self._read)

    def __contains__(self, name: object) -> bool:
        return any(name in (spec.name, spec.output) for spec in self._manifest.states)

    def __iter__(self) -> Iterator[str]:
        return iter(spec.name for spec in self._manifest.states)

    def __len__(self) -> int:
        return len(self._manifest.states)

    def numpy(self) -> dict[str, HostArray]:
        """Copies of all of them on the host; see `StateView.numpy`."""
        return {name: view.numpy() for name, view in self.items()}


def find_state(manifest: Manifest, name: str) -> StateSpec:
    """The state of which this is the past's or the present's name.

    Raises:
        StateError: There is none.
    """
    for spec in manifest.states:
        if name in (spec.name, spec.output):
            return spec
    expected = ", ".join(spec.name for spec in manifest.states) or "none: the model has no states"
    raise StateError("no such state", got=name, expected=expected)
