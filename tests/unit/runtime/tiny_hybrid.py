"""A tiny hybrid model for the runtime's tests: MLIR text with the ABI of a compiled module, and the same in numpy.

Per token: a decaying recurrent state, a conv state that holds the token before, and a KV cache that is summed under the
mask. All numbers are small multiples of powers of two, so how the tokens are cut hardly changes a bit.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import numpy as np
from iree.compiler.tools import compile_str
from linattn.runtime.cpu import machine_architecture
from linattn.runtime.integrity import sealed
from linattn.runtime.manifest import EntryPoint, InputSpec, Manifest, OutputSpec, StateSpec
from linattn.runtime.manifest_target import Target

FLAGS = {
    "cpu": (
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-llvmcpu-target-cpu=generic",
    ),
    "vulkan": ("--iree-hal-target-device=vulkan",),
}
ANY_CPU = Target("cpu", "local-task", "test", architecture=machine_architecture())


@dataclass(frozen=True)
class Hybrid:
    """Which form to compile; `blocks` holds token counts, None among them for an open one."""

    target: str = "cpu"
    batch: int | None = 1
    max_context: int | None = 24
    blocks: tuple[int | None, ...] = (1, 3, 8)

    def manifest(self) -> Manifest:
        return Manifest(
            model_name="tiny-hybrid",
            model_sha256="0" * 64,
            target=ANY_CPU if self.target == "cpu" else Target("vulkan", "vulkan", "test"),
            batch=self.batch,
            max_context=self.max_context,
            context_limit=None,
            inputs=(
                InputSpec("input_ids", "int64", ("batch_size", "sequence_length"), "tokens"),
                InputSpec("attention_mask", "int64", ("batch_size", "total_sequence_length"), "attention_mask"),
                InputSpec("position_ids", "int64", ("batch_size", "sequence_length"), "position_ids"),
            ),
            outputs=(OutputSpec("logits", "float32", ("batch_size", "sequence_length", 4), "logits", 1),),
            states=(
                StateSpec("past.0.rec", "present.0.rec", "recurrent", "float32", ("batch_size", 4)),
                StateSpec("past.0.conv", "present.0.conv", "conv", "float32", ("batch_size", 4, 1)),
                StateSpec(
                    "past.1.kv",
                    "present.1.kv",
                    "kv_cache",
                    "float32",
                    ("batch_size", 2, "past_sequence_length", 4),
                    2,
                    self.max_context is not None,
                ),
            ),
            entry_points=tuple(_entry(tokens) for tokens in self.blocks),
            row_masks=True,
            dims={
                "batch_size": "batch",
                "sequence_length": "tokens",
                "past_sequence_length": "past",
                "total_sequence_length": "total",
            },
        )

    def compile(self, manifest_text: str | None = None) -> bytes:
        """The module's bytes; `manifest_text` replaces the right manifest by a bad one ("" for none)."""
        text = self.manifest().to_json() if manifest_text is None else manifest_text
        functions = [self._function(entry) for entry in self.manifest().entry_points]
        escaped = text.replace("\\", "\\5C").replace('"', "\\22")
        attribute = f'attributes {{iree.reflection = {{linattn.manifest = "{escaped}"}}}}' if text else ""
        source = "\n".join(["module @linattn {", *functions, "}"]).replace("ATTRIBUTE", attribute)
        return _compile(source, self.target)

    def _function(self, entry: EntryPoint) -> str:
        b, t, m = _dim(self.batch), _dim(entry.tokens), _dim(self.max_context)
        total = "?" if "?" in (t, m) else str(int(t) + int(m))
        body = _BODY.replace("NAME", entry.symbol)
        kv_type = "!torch.vtensor<[B,2,M,4],f32>"
        if self.max_context:
            body = body.replace("ARGUMENTS", f"%kv_arg: {kv_type}, %position: !torch.int").replace(
                "MORE", f", {kv_type} {{iree.abi.tied = 5}}"
            )
            body = body.replace("READ", _READ_CAPACITY).replace("WRITE", _WRITE_CAPACITY).replace("RETURN", _RETURN)
        else:
            body = body.replace("ARGUMENTS", f"%kv_arg: {kv_type}").replace("MORE", ", !torch.vtensor<[B,2,?,4],f32>")
            body = body.replace("READ", _READ_OPEN).replace("WRITE", _WRITE_OPEN).replace("RETURN", _RETURN_OPEN)
        for letter, size in (("N", total), ("B", b), ("T", t), ("M", m)):
            body = re.sub(rf"(?<=[<x\[,]){letter}(?=[x\],])", size, body)
        return body

    def reference(self, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits [B, T, 4] and the states after ids [B, T], from nothing, in float64."""
        return reference(ids)


def reference(ids: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [B, T, 4] and the states (KV with T rows) after ids [B, T] from nothing, token by token."""
    batch, tokens = ids.shape
    channel, head = np.arange(4), np.arange(2)
    rec, conv = np.zeros((batch, 4)), np.zeros((batch, 4))
    rows = np.zeros((batch, 2, 0, 4))
    logits = np.zeros((batch, tokens, 4))
    mask = np.ones_like(ids) if mask is None else mask
    for t in range(tokens):
        token = ids[:, t, None].astype(np.float64)
        rec = 0.5 * rec + (token * (channel + 3)) % 7
        row = (token * ((t + channel) % 4 + 1))[:, None, None, :] + head[None, :, None, None]
        rows = np.concatenate([rows, row], 2)
        attended = (rows * mask[:, None, : t + 1, None]).sum((1, 2))
        logits[:, t] = rec + 0.125 * conv + 0.25 * attended
        conv = np.broadcast_to(token, conv.shape)
    return logits, {"past.0.rec": rec, "past.0.conv": conv[:, :, None], "past.1.kv": rows}


def open_form(hybrid: Hybrid) -> Hybrid:
    """The same model with everything open."""
    return replace(hybrid, batch=None, max_context=None, blocks=(1, None))


def _entry(tokens: int | None) -> EntryPoint:
    if tokens == 1:
        return EntryPoint("decode", "decode", 1)
    return EntryPoint("prefill_open" if tokens is None else f"prefill_{tokens}", "prefill", tokens)


def _dim(size: int | None) -> str:
    return "?" if size is None else str(size)


@functools.cache
def _compile(source: str, target: str) -> bytes:
    return sealed(compile_str(source, input_type="torch", extra_args=[*FLAGS[target]]))


_IDS = "affine_map<(b, t, d) -> (b, t)>"
_BTD = "affine_map<(b, t, d) -> (b, t, d)>"
_TS = "affine_map<(t, s) -> (t, s)>"
_PARALLEL3 = 'iterator_types = ["parallel", "parallel", "parallel"]'
_PARALLEL4 = 'iterator_types = ["parallel", "parallel", "parallel", "parallel"]'
_BODY = f"""
func.func @NAME(%ids_arg: !torch.vtensor<[B,T],si64>, %mask_arg: !torch.vtensor<[B,N],si64>,
    %pos_arg: !torch.vtensor<[B,T],si64>, %rec_arg: !torch.vtensor<[B,4],f32>,
    %conv_arg: !torch.vtensor<[B,4,1],f32>, ARGUMENTS)
    -> (!torch.vtensor<[B,T,4],f32>, !torch.vtensor<[B,4],f32>, !torch.vtensor<[B,4,1],f32>MORE) ATTRIBUTE {{
  %ids = torch_c.to_builtin_tensor %ids_arg : !torch.vtensor<[B,T],si64> -> tensor<BxTxi64>
  %mask = torch_c.to_builtin_tensor %mask_arg : !torch.vtensor<[B,N],si64> -> tensor<BxNxi64>
  %pos = torch_c.to_builtin_tensor %pos_arg : !torch.vtensor<[B,T],si64> -> tensor<BxTxi64>
  %rec = torch_c.to_builtin_tensor %rec_arg : !torch.vtensor<[B,4],f32> -> tensor<Bx4xf32>
  %conv3 = torch_c.to_builtin_tensor %conv_arg : !torch.vtensor<[B,4,1],f32> -> tensor<Bx4x1xf32>
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c3 = arith.constant 3 : index
  %zero = arith.constant 0.0 : f32
  %one = arith.constant 1.0 : f32
  %eighth = arith.constant 0.125 : f32
  %quarter = arith.constant 0.25 : f32
  %bb = tensor.dim %ids, %c0 : tensor<BxTxi64>
  %tt = tensor.dim %ids, %c1 : tensor<BxTxi64>
  %nn = tensor.dim %mask, %c1 : tensor<BxNxi64>
  %mm = arith.subi %nn, %tt : index
  %last = arith.subi %tt, %c1 : index
  %conv = tensor.extract_slice %conv3[0, 0, 0] [%bb, 4, 1] [1, 1, 1] : tensor<Bx4x1xf32> to tensor<?x4xf32>
  %e = tensor.empty(%bb, %tt) : tensor<?x?x4xf32>
  %feat = linalg.generic {{indexing_maps = [{_IDS}, {_BTD}], {_PARALLEL3}}}
      ins(%ids : tensor<BxTxi64>) outs(%e : tensor<?x?x4xf32>) {{
  ^bb0(%id: i64, %o: f32):
    %d = linalg.index 2 : index
    %d3 = arith.addi %d, %c3 : index
    %di = arith.index_cast %d3 : index to i32
    %ii = arith.trunci %id : i64 to i32
    %p = arith.muli %ii, %di : i32
    %c7 = arith.constant 7 : i32
    %r = arith.remsi %p, %c7 : i32
    %f = arith.sitofp %r : i32 to f32
    linalg.yield %f : f32
  }} -> tensor<?x?x4xf32>
  %raw = linalg.generic {{indexing_maps = [{_IDS}, {_BTD}], {_PARALLEL3}}}
      ins(%ids : tensor<BxTxi64>) outs(%e : tensor<?x?x4xf32>) {{
  ^bb0(%id: i64, %o: f32):
    %ii = arith.trunci %id : i64 to i32
    %f = arith.sitofp %ii : i32 to f32
    linalg.yield %f : f32
  }} -> tensor<?x?x4xf32>
  %er = tensor.empty(%bb, %tt) : tensor<?x2x?x4xf32>
  %rows = linalg.generic {{indexing_maps = [affine_map<(b, h, t, d) -> (b, t)>, affine_map<(b, h, t, d) -> (b, t)>,
      affine_map<(b, h, t, d) -> (b, h, t, d)>], {_PARALLEL4}}}
      ins(%ids, %pos : tensor<BxTxi64>, tensor<BxTxi64>) outs(%er : tensor<?x2x?x4xf32>) {{
  ^bb0(%id: i64, %at: i64, %o: f32):
    %h = linalg.index 1 : index
    %d = linalg.index 3 : index
    %di = arith.index_cast %d : index to i32
    %hi = arith.index_cast %h : index to i32
    %ii = arith.trunci %id : i64 to i32
    %pi = arith.trunci %at : i64 to i32
    %i1 = arith.constant 1 : i32
    %i4 = arith.constant 4 : i32
    %pd = arith.addi %pi, %di : i32
    %turn = arith.remsi %pd, %i4 : i32
    %factor = arith.addi %turn, %i1 : i32
    %y = arith.muli %ii, %factor : i32
    %z = arith.addi %y, %hi : i32
    %f = arith.sitofp %z : i32 to f32
    linalg.yield %f : f32
  }} -> tensor<?x2x?x4xf32>
  %es = tensor.empty(%tt, %tt) : tensor<?x?xf32>
  %decay = linalg.generic {{indexing_maps = [{_TS}], iterator_types = ["parallel", "parallel"]}}
      outs(%es : tensor<?x?xf32>) {{
  ^bb0(%o: f32):
    %t = linalg.index 0 : index
    %s = linalg.index 1 : index
    %ti = arith.index_cast %t : index to i32
    %si = arith.index_cast %s : index to i32
    %gap = arith.subi %si, %ti : i32
    %gf = arith.sitofp %gap : i32 to f32
    %w = math.exp2 %gf : f32
    %in = arith.cmpi sle, %s, %t : index
    %r = arith.select %in, %w, %zero : f32
    linalg.yield %r : f32
  }} -> tensor<?x?xf32>
  %causal = linalg.generic {{indexing_maps = [{_TS}], iterator_types = ["parallel", "parallel"]}}
      outs(%es : tensor<?x?xf32>) {{
  ^bb0(%o: f32):
    %t = linalg.index 0 : index
    %s = linalg.index 1 : index
    %in = arith.cmpi sle, %s, %t : index
    %r = arith.select %in, %one, %zero : f32
    linalg.yield %r : f32
  }} -> tensor<?x?xf32>
  %before = linalg.generic {{indexing_maps = [{_TS}], iterator_types = ["parallel", "parallel"]}}
      outs(%es : tensor<?x?xf32>) {{
  ^bb0(%o: f32):
    %t = linalg.index 0 : index
    %s = linalg.index 1 : index
    %ti = arith.index_cast %t : index to i32
    %si = arith.index_cast %s : index to i32
    %gap = arith.subi %si, %ti : i32
    %minus = arith.constant -1 : i32
    %is = arith.cmpi eq, %gap, %minus : i32
    %r = arith.select %is, %one, %zero : f32
    linalg.yield %r : f32
  }} -> tensor<?x?xf32>
  %maskn = tensor.extract_slice %mask[0, %mm] [%bb, %tt] [1, 1] : tensor<BxNxi64> to tensor<?x?xi64>
  %masko = tensor.extract_slice %mask[0, 0] [%bb, %mm] [1, 1] : tensor<BxNxi64> to tensor<?x?xi64>
  READ
  %start = linalg.generic {{indexing_maps = [affine_map<(b, t, d) -> (b, d)>, affine_map<(b, t, d) -> (b, d)>, {_BTD}],
      {_PARALLEL3}}} ins(%rec, %conv : tensor<Bx4xf32>, tensor<?x4xf32>) outs(%e : tensor<?x?x4xf32>) {{
  ^bb0(%r: f32, %c: f32, %o: f32):
    %t = linalg.index 1 : index
    %t1 = arith.addi %t, %c1 : index
    %ti = arith.index_cast %t1 : index to i32
    %tf = arith.sitofp %ti : i32 to f32
    %neg = arith.negf %tf : f32
    %w = math.exp2 %neg : f32
    %x = arith.mulf %w, %r : f32
    %first = arith.cmpi eq, %t, %c0 : index
    %y0 = arith.mulf %eighth, %c : f32
    %y = arith.select %first, %y0, %zero : f32
    %z = arith.addf %x, %y : f32
    linalg.yield %z : f32
  }} -> tensor<?x?x4xf32>
  %ez = linalg.fill ins(%zero : f32) outs(%e : tensor<?x?x4xf32>) -> tensor<?x?x4xf32>
  %sum = linalg.generic {{indexing_maps = [affine_map<(b, t, d, s) -> (b, s, d)>, affine_map<(b, t, d, s) -> (b, s, d)>,
      affine_map<(b, t, d, s) -> (t, s)>, affine_map<(b, t, d, s) -> (t, s)>, affine_map<(b, t, d, s) -> (b, t, d)>],
      iterator_types = ["parallel", "parallel", "parallel", "reduction"]}}
      ins(%feat, %raw, %decay, %before : tensor<?x?x4xf32>, tensor<?x?x4xf32>, tensor<?x?xf32>, tensor<?x?xf32>)
      outs(%ez : tensor<?x?x4xf32>) {{
  ^bb0(%f: f32, %r: f32, %w: f32, %p: f32, %o: f32):
    %x = arith.mulf %f, %w : f32
    %y0 = arith.mulf %r, %p : f32
    %y = arith.mulf %y0, %eighth : f32
    %z = arith.addf %x, %y : f32
    %a = arith.addf %o, %z : f32
    linalg.yield %a : f32
  }} -> tensor<?x?x4xf32>
  %new = linalg.generic {{indexing_maps = [affine_map<(b, t, d, h, s) -> (b, h, s, d)>,
      affine_map<(b, t, d, h, s) -> (b, s)>, affine_map<(b, t, d, h, s) -> (t, s)>,
      affine_map<(b, t, d, h, s) -> (b, t, d)>],
      iterator_types = ["parallel", "parallel", "parallel", "reduction", "reduction"]}}
      ins(%rows, %maskn, %causal : tensor<?x2x?x4xf32>, tensor<?x?xi64>, tensor<?x?xf32>)
      outs(%ez : tensor<?x?x4xf32>) {{
  ^bb0(%k: f32, %mi: i64, %c: f32, %o: f32):
    %mt = arith.trunci %mi : i64 to i32
    %mf = arith.sitofp %mt : i32 to f32
    %x = arith.mulf %k, %mf : f32
    %y0 = arith.mulf %x, %c : f32
    %y = math.absf %y0 : f32
    %a = arith.addf %o, %y : f32
    linalg.yield %a : f32
  }} -> tensor<?x?x4xf32>
  %eo = tensor.empty(%bb) : tensor<?x4xf32>
  %eoz = linalg.fill ins(%zero : f32) outs(%eo : tensor<?x4xf32>) -> tensor<?x4xf32>
  %old = linalg.generic {{indexing_maps = [affine_map<(b, d, h, j) -> (b, h, j, d)>, affine_map<(b, d, h, j) -> (b, j)>,
      affine_map<(b, d, h, j) -> (b, d)>], iterator_types = ["parallel", "parallel", "reduction", "reduction"]}}
      ins(%kv, %masko : tensor<Bx2xMx4xf32>, tensor<?x?xi64>) outs(%eoz : tensor<?x4xf32>) {{
  ^bb0(%k: f32, %mi: i64, %o: f32):
    %mt = arith.trunci %mi : i64 to i32
    %mf = arith.sitofp %mt : i32 to f32
    %x0 = arith.mulf %k, %mf : f32
    %x = math.absf %x0 : f32
    %a = arith.addf %o, %x : f32
    linalg.yield %a : f32
  }} -> tensor<?x4xf32>
  %el = tensor.empty(%bb, %tt) : tensor<?x?x4xf32>
  %logits0 = linalg.generic {{indexing_maps = [{_BTD}, {_BTD}, {_BTD}, affine_map<(b, t, d) -> (b, d)>, {_BTD}],
      {_PARALLEL3}}}
      ins(%start, %sum, %new, %old : tensor<?x?x4xf32>, tensor<?x?x4xf32>, tensor<?x?x4xf32>, tensor<?x4xf32>)
      outs(%el : tensor<?x?x4xf32>) {{
  ^bb0(%a: f32, %b: f32, %c: f32, %d: f32, %o: f32):
    %x = arith.addf %a, %b : f32
    %y = arith.addf %c, %d : f32
    %z = arith.mulf %y, %quarter : f32
    %r = arith.addf %x, %z : f32
    linalg.yield %r : f32
  }} -> tensor<?x?x4xf32>
  %recs = linalg.generic {{indexing_maps = [affine_map<(b, t, d, s) -> (b, s, d)>, affine_map<(b, t, d, s) -> (t, s)>,
      affine_map<(b, t, d, s) -> (b, t, d)>], iterator_types = ["parallel", "parallel", "parallel", "reduction"]}}
      ins(%feat, %decay : tensor<?x?x4xf32>, tensor<?x?xf32>) outs(%ez : tensor<?x?x4xf32>) {{
  ^bb0(%f: f32, %w: f32, %o: f32):
    %x = arith.mulf %f, %w : f32
    %a = arith.addf %o, %x : f32
    linalg.yield %a : f32
  }} -> tensor<?x?x4xf32>
  %reclast = tensor.extract_slice %recs[0, %last, 0] [%bb, 1, 4] [1, 1, 1] : tensor<?x?x4xf32> to tensor<?x4xf32>
  %rawlast = tensor.extract_slice %raw[0, %last, 0] [%bb, 1, 4] [1, 1, 1] : tensor<?x?x4xf32> to tensor<?x4xf32>
  %tl = arith.index_cast %tt : index to i32
  %tlf = arith.sitofp %tl : i32 to f32
  %tln = arith.negf %tlf : f32
  %wl = math.exp2 %tln : f32
  %rec1 = linalg.generic {{indexing_maps = [affine_map<(b, d) -> (b, d)>, affine_map<(b, d) -> (b, d)>,
      affine_map<(b, d) -> (b, d)>], iterator_types = ["parallel", "parallel"]}}
      ins(%rec, %reclast : tensor<Bx4xf32>, tensor<?x4xf32>) outs(%eo : tensor<?x4xf32>) {{
  ^bb0(%a: f32, %b: f32, %o: f32):
    %x = arith.mulf %a, %wl : f32
    %y = arith.addf %x, %b : f32
    linalg.yield %y : f32
  }} -> tensor<?x4xf32>
  %logits = tensor.cast %logits0 : tensor<?x?x4xf32> to tensor<BxTx4xf32>
  %rec2 = tensor.cast %rec1 : tensor<?x4xf32> to tensor<Bx4xf32>
  %conv1 = tensor.expand_shape %rawlast [[0], [1, 2]] output_shape [%bb, 4, 1] : tensor<?x4xf32> into tensor<?x4x1xf32>
  %conv2 = tensor.cast %conv1 : tensor<?x4x1xf32> to tensor<Bx4x1xf32>
  %logits_res = torch_c.from_builtin_tensor %logits : tensor<BxTx4xf32> -> !torch.vtensor<[B,T,4],f32>
  %rec_res = torch_c.from_builtin_tensor %rec2 : tensor<Bx4xf32> -> !torch.vtensor<[B,4],f32>
  %conv_res = torch_c.from_builtin_tensor %conv2 : tensor<Bx4x1xf32> -> !torch.vtensor<[B,4,1],f32>
  WRITE
  RETURN
}}"""
# Rows are written first and attention reads the written cache: IREE may not read an argument that a result is tied to
# once it has been overwritten.
_READ_CAPACITY = """%past = torch_c.to_builtin_tensor %kv_arg : !torch.vtensor<[B,2,M,4],f32> -> tensor<Bx2xMx4xf32>
  %position64 = torch_c.to_i64 %position
  %at = arith.index_cast %position64 : i64 to index
  %kv = tensor.insert_slice %rows into %past[0, 0, %at, 0] [%bb, 2, %tt, 4] [1, 1, 1, 1]
      : tensor<?x2x?x4xf32> into tensor<Bx2xMx4xf32>"""
_WRITE_CAPACITY = """%kv_res = torch_c.from_builtin_tensor %kv
      : tensor<Bx2xMx4xf32> -> !torch.vtensor<[B,2,M,4],f32>"""
_RETURN = """return %logits_res, %rec_res, %conv_res, %kv_res
      : !torch.vtensor<[B,T,4],f32>, !torch.vtensor<[B,4],f32>, !torch.vtensor<[B,4,1],f32>,
        !torch.vtensor<[B,2,M,4],f32>"""
_READ_OPEN = """%kv = torch_c.to_builtin_tensor %kv_arg : !torch.vtensor<[B,2,M,4],f32> -> tensor<Bx2xMx4xf32>"""
_WRITE_OPEN = """%ek = tensor.empty(%bb, %nn) : tensor<?x2x?x4xf32>
  %kva = tensor.insert_slice %kv into %ek[0, 0, 0, 0] [%bb, 2, %mm, 4] [1, 1, 1, 1]
      : tensor<Bx2xMx4xf32> into tensor<?x2x?x4xf32>
  %kvb = tensor.insert_slice %rows into %kva[0, 0, %mm, 0] [%bb, 2, %tt, 4] [1, 1, 1, 1]
      : tensor<?x2x?x4xf32> into tensor<?x2x?x4xf32>
  %kvc = tensor.cast %kvb : tensor<?x2x?x4xf32> to tensor<Bx2x?x4xf32>
  %kv_res = torch_c.from_builtin_tensor %kvc : tensor<Bx2x?x4xf32> -> !torch.vtensor<[B,2,?,4],f32>"""
_RETURN_OPEN = """return %logits_res, %rec_res, %conv_res, %kv_res
      : !torch.vtensor<[B,T,4],f32>, !torch.vtensor<[B,4],f32>, !torch.vtensor<[B,4,1],f32>,
        !torch.vtensor<[B,2,?,4],f32>"""
