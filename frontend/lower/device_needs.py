"""What the kernels of a finished module need of a GPU, read off their code."""

from __future__ import annotations

from collections.abc import Iterable

from iree.compiler import ir
from linattn.runtime.manifest_target import DeviceNeeds

from .executables import kernels, spirv_capabilities

_FEATURES = {
    "Float16": "shaderFloat16",
    "Float64": "shaderFloat64",
    "Int8": "shaderInt8",
    "Int16": "shaderInt16",
    "Int64": "shaderInt64",
    "StorageBuffer16BitAccess": "storageBuffer16BitAccess",
    "StorageUniform16": "uniformAndStorageBuffer16BitAccess",
    "StoragePushConstant16": "storagePushConstant16",
    "StorageBuffer8BitAccess": "storageBuffer8BitAccess",
    "UniformAndStorageBuffer8BitAccess": "uniformAndStorageBuffer8BitAccess",
    "StoragePushConstant8": "storagePushConstant8",
    "CooperativeMatrixKHR": "cooperativeMatrix",
    "GroupNonUniform": "subgroupBasic",
    "GroupNonUniformVote": "subgroupVote",
    "GroupNonUniformArithmetic": "subgroupArithmetic",
    "GroupNonUniformBallot": "subgroupBallot",
    "GroupNonUniformShuffle": "subgroupShuffle",
    "GroupNonUniformShuffleRelative": "subgroupShuffleRelative",
    "GroupNonUniformClustered": "subgroupClustered",
    "GroupNonUniformQuad": "subgroupQuad",
}
"""SPIR-V capability -> the feature of a Vulkan device that allows it; others come with Vulkan 1.3."""


def device_needs(module: ir.Operation) -> DeviceNeeds:
    """The most of everything.

    Args:
        module: After the phase ``executable-targets``, for a GPU.
    """
    found = list(kernels(module))
    features = {_FEATURES[name] for name in spirv_capabilities(module) if name in _FEATURES}

    def most(numbers: Iterable[int]) -> int:
        return max(numbers, default=0)

    return DeviceNeeds(
        threads=max(1, most(kernel.threads for kernel in found)),
        shared_memory=most(kernel.memory for kernel in found),
        storage_buffers=most(kernel.bindings for kernel in found),
        push_constants=most(4 * kernel.constants for kernel in found),
        features=tuple(sorted(features)),
    )
