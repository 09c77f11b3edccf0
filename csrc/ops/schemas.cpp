// Names only: the ops' schemas, and with them the library's registration with torch.
//
// The ops are torch operators behind LibTorch's stable ABI, and know nothing of Python: one binary
// runs under torch 2.10 and every later version, with or without CUDA, under any Python.
#include <torch/csrc/stable/library.h>

namespace {

// Every op has two names: wgpt::x, to which Python gives a gradient, and wgpt_kernels::x for where the
// gradient is taken care of (wgpt/ops/gradient.py). SymInt where a size may be unknown while torch.compile
// traces.
void define_ops(torch::stable::detail::StableLibrary& m) {
  m.def(
      "mel_embed(Tensor frames, Tensor mean, Tensor inv_std, Tensor weight, Tensor bias, "
      "Tensor? pos, int frames_per_step, int context_frames, bool save_slope) "
      "-> (Tensor y, Tensor slope)");
  m.def(
      "mel_embed_backward(Tensor d_y, Tensor slope, Tensor frames, Tensor mean, Tensor inv_std, "
      "SymInt pos_rows, int frames_per_step, int context_frames) "
      "-> (Tensor d_weight, Tensor d_bias, Tensor d_pos)");
  m.def("token_concat(Tensor tokens, Tensor table, Tensor? mel_hidden, Tensor? pos) -> Tensor");
  m.def(
      "token_concat_backward(Tensor d_y, Tensor tokens, SymInt vocab, SymInt token_channels, "
      "SymInt pos_rows) -> (Tensor d_table, Tensor d_pos)");
  m.def(
      "flash_attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window, "
      "Tensor? first_key=None, Tensor? bias=None, float softcap=0.) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "flash_attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, float scale, bool causal, int window, Tensor? first_key=None, "
      "Tensor? bias=None, float softcap=0.) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
  // What a profile of the training step asked for (docs/log.md); linear on the CPU only.
  m.def(
      "add_rms_norm(Tensor x, Tensor? delta, Tensor weight, float eps, ScalarType dtype) "
      "-> (Tensor sum, Tensor y, Tensor inv_rms)");
  m.def(
      "add_rms_norm_backward(Tensor? d_sum, Tensor d_y, Tensor sum, Tensor inv_rms, Tensor weight, "
      "ScalarType? delta_dtype) -> (Tensor d_x, Tensor d_delta, Tensor d_weight)");
  m.def("rotary_qkv(Tensor qkv, Tensor cos, Tensor sin) -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "rotary_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) "
      "-> Tensor d_qkv");
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_backward(Tensor d_y, Tensor x, Tensor weight) -> (Tensor d_x, Tensor d_weight)");
  m.def("feed_forward(Tensor x, Tensor up, Tensor down) -> (Tensor y, Tensor z)");
  m.def(
      "feed_forward_backward(Tensor d_y, Tensor x, Tensor z, Tensor up, Tensor down) "
      "-> (Tensor d_x, Tensor d_up, Tensor d_down)");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
      "bool gradients) -> (Tensor loss, Tensor n_correct, Tensor d_hidden, Tensor d_weight)");
  // On the CPU only: what generation needs to give an item of a batch the bits that it gets alone.
  m.def(
      "packed_addmm(Tensor x, Tensor panels, Tensor? addend, SymInt columns, Tensor? scale=None) "
      "-> Tensor");
}

// What only the second name has: a kernel in whose place the public function runs others where it does not fit.
void define_kernels(torch::stable::detail::StableLibrary& m) {
  m.def(
      "token_concat_norm(Tensor tokens, Tensor table, Tensor x, Tensor? delta, Tensor mel_weight, "
      "Tensor weight, float mel_eps, float eps, ScalarType dtype) "
      "-> (Tensor cat, Tensor y, Tensor mel_inv_rms, Tensor inv_rms)");
  m.def(
      "token_concat_norm_backward(Tensor? d_cat, Tensor d_y, Tensor cat, Tensor tokens, Tensor x, "
      "Tensor? delta, Tensor mel_inv_rms, Tensor inv_rms, Tensor mel_weight, Tensor weight, "
      "int vocab) -> (Tensor d_table, Tensor d_x, Tensor d_delta, Tensor d_weights)");
}

// An op's checks of its arguments by themselves, on any device: for where the formula runs in plain torch.
void define_checks(torch::stable::detail::StableLibrary& m) {
  m.def(
      "check_mel_embed(Tensor frames, Tensor mean, Tensor inv_std, Tensor weight, Tensor bias, "
      "Tensor? pos, int frames_per_step, int context_frames) -> ()");
  m.def("check_token_concat(Tensor tokens, Tensor table, Tensor? mel_hidden, Tensor? pos) -> ()");
  m.def(
      "check_flash_attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window, "
      "Tensor? first_key, Tensor? bias, float softcap) -> ()");
  m.def("check_add_rms_norm(Tensor x, Tensor? delta, Tensor weight, ScalarType dtype) -> ()");
  m.def("check_rotary_qkv(Tensor qkv, Tensor cos, Tensor sin) -> ()");
  m.def("check_linear(Tensor x, Tensor weight) -> ()");
  m.def("check_feed_forward(Tensor x, Tensor up, Tensor down) -> ()");
  m.def("check_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets) -> ()");
}

}  // namespace

STABLE_TORCH_LIBRARY(wgpt, m) { define_ops(m); }
STABLE_TORCH_LIBRARY(wgpt_kernels, m) {
  define_ops(m);
  define_kernels(m);
  define_checks(m);
}
