"""Makes Triton's interpreter several times as fast; what it computes stays the same.

A kernel of small blocks spends its time in Python, on questions that have one answer. Here each is
asked once: what stands for a function of `triton.language`, the attributes of a shape, and the type
in numpy of a type of Triton. Sums of integers are checked for overflow by numpy.
"""

import functools
import math

import numpy
import triton.language as tl
from triton.runtime import interpreter

CONTAINERS = (list, tuple, tl.tuple)
OPERATIONS = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}


@functools.cache
def make_fast():
    """Exchanges functions of the interpreter and of its language, for the whole process."""
    semantic = type(interpreter.interpreter_semantic)
    interpreter._patch_lang = exchanging_once(interpreter._patch_lang)
    interpreter._get_np_dtype = remembering_by_name(interpreter._get_np_dtype)
    semantic.binary_op_sanitize_overflow_impl = refuse_overflow
    tl.core._unwrap_if_constexpr = unwrapping_at_once(tl.core._unwrap_if_constexpr)
    tl.core.tensor.__init__ = make_tensor
    tl.core.block_type.__init__ = make_block_type


def exchanging_once(exchange):
    """The function that exchanges `triton.language`'s functions for numpy's, once and for good.

    The interpreter exchanges them at every launch and at every call of one jitted function by
    another, and back after the launch.
    """
    exchanged = set()

    @functools.cache
    def languages_of(function):
        held = function.__globals__.values()
        return any(value is tl for value in held), any(value is tl.core for value in held)

    def exchange_what_is_new(function):
        languages = languages_of(function)
        if languages not in exchanged:
            exchanged.add(languages)
            exchange(function)
        return interpreter._LangPatchScope()  # which has nothing to exchange back

    return exchange_what_is_new


def remembering_by_name(function):
    """The function of a type of Triton, called once for each type. Types of blocks have no hash."""
    known = {}

    def remembered(dtype):
        if dtype.name not in known:
            known[dtype.name] = function(dtype)
        return known[dtype.name]

    return remembered


def refuse_overflow(_, lhs, rhs, operation):
    """Raises where a result does not fit the type of its operands, integers of up to 32 bits."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth < 64:
        operands = (x.handle.data.astype(numpy.int64) for x in (lhs, rhs))
        exact = OPERATIONS[operation.__name__](*operands)
        within = (exact >= dtype.get_int_min_value()) & (exact <= dtype.get_int_max_value())
        assert within.all(), f"{operation.__name__} overflows {dtype}"


def unwrapping_at_once(unwrap):
    """The function that gives the number in a constant, with two questions in place of four."""

    def unwrapped(x):
        if isinstance(x, CONTAINERS):
            return unwrap(x)
        return x.value if isinstance(x, tl.constexpr) else x

    return unwrapped


def make_tensor(tensor, handle, dtype):
    """The constructor of tl.tensor, whose shape is of constants."""
    tensor.handle, tensor.type, tensor.dtype = handle, dtype, dtype.scalar
    sizes = tuple(dtype.shape.values) if dtype.is_block() else ()
    tensor.shape, tensor.numel = constant_shape(sizes)


@functools.cache
def constant_shape(sizes):
    """A shape of these sizes, and its number of elements."""
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def make_block_type(block, element, shape):
    """The constructor of tl.block_type, whose shape is of numbers."""
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    block.element_ty, (block.shape, block.numel) = element, checked_shape(sizes)
    block.name = f"<{sizes}, {element}>"


@functools.cache
def checked_shape(sizes):
    """A shape of these sizes, and its number of elements."""
    return tl.tuple(sizes), tl.core.validate_block_shape(sizes)
