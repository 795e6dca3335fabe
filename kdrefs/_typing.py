"""Array types with shapes for public signatures; jaxtyping's where it is installed.

jaxtyping is optional at run time: without it, ``Float[Tensor, "batch classes"]`` is plain ``Tensor``, and the
shape is documentation only.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Integer, Shaped, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, Integer, Shaped, UInt8
    except ImportError:

        class _Unchecked:
            """Stand-in for a jaxtyping dtype: subscripting it gives back the array type."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = Integer = Shaped = UInt8 = _Unchecked

__all__ = ["Bool", "Float", "Int", "Integer", "Shaped", "UInt8"]
