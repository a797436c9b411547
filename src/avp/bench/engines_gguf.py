"""A GGUF file with the weights of another one in float32, written by the `gguf` package."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

_OWN = ("general.architecture", "general.file_type", "general.quantization_version")
_ALL_FLOAT32 = 0  # general.file_type


def write_float32(source: Path, target: Path) -> Path:
    """`target`, with the header and the order of rows of `source`, every tensor dequantised; nothing if it is there.

    Keys stay permuted as llama.cpp wants them. It is another file, and so another identity: an engine that is to share
    KV with it has to load it.
    """
    if target.is_file():
        return target
    reader = GGUFReader(source)
    named = reader.fields["general.architecture"].contents()
    fresh = target.with_suffix(".part")
    writer = GGUFWriter(fresh, str(named))
    for field in reader.fields.values():
        if field.name in _OWN or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    writer.add_file_type(_ALL_FLOAT32)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        writer.add_tensor(tensor.name, values.reshape(shape), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fresh.replace(target)
    return target
