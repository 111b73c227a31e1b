#include "activation.h"

#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "graph.h"

namespace moe_edge {

namespace {

class Builder {
public:
    Builder(ggml_context * ctx, ActivationInputs & in, std::string & error) : ctx_(ctx), in_(in), error_(error) {}

    // The real-width tensor for a node of llama.cpp's graph; a node that is used twice is built once.
    ggml_tensor * build(const ggml_tensor * t) {
        const auto it = built_.find(t);
        if (it != built_.end()) return it->second;
        ggml_tensor * made = make(t);
        built_.emplace(t, made);
        return made;
    }

private:
    ggml_tensor * make(const ggml_tensor * t) {
        switch (t->op) {
            case GGML_OP_MUL_MAT_ID: return product(t);
            case GGML_OP_VIEW: return half(t);
            case GGML_OP_ADD_ID: return biased(t);
            case GGML_OP_GLU:
            case GGML_OP_MUL: return combined(t);
            case GGML_OP_UNARY:
            case GGML_OP_CLAMP:
            case GGML_OP_SQR:
            case GGML_OP_SCALE: {
                ggml_tensor * a = build(t->src[0]);
                return a ? copy_op(t, a, nullptr, nullptr) : nullptr;
            }
            default: return refuse(std::string("unknown operation '") + ggml_op_desc(t) + "' ('" + t->name + "') between the expert products");
        }
    }

    ggml_tensor * product(const ggml_tensor * t) {
        const Stub * s = find_stub(t->src[0]);
        ggml_tensor * r = !s ? nullptr : s->projection == UP ? in_.up : s->projection == GATE ? in_.gate : in_.gate_up;
        return r ? r : refuse(std::string("the graph multiplies by '") + t->src[0]->name + "', which is not an expert tensor of this model");
    }

    // Gate or up of a fused product: in the graph, one of two values per row.
    ggml_tensor * half(const ggml_tensor * t) {
        ggml_tensor * whole = build(t->src[0]);
        if (!whole) return nullptr;
        size_t offset = 0;
        memcpy(&offset, t->op_params, sizeof(offset));
        if (whole->ne[0] != 2 * in_.n_ff || t->ne[0] != 1 || offset > sizeof(float)) {
            return refuse(std::string("unknown view '") + t->name + "' between the expert products");
        }
        return ggml_view_3d(ctx_, whole, in_.n_ff, 1, whole->ne[2], whole->nb[1], whole->nb[2], offset * static_cast<size_t>(in_.n_ff));
    }

    ggml_tensor * biased(const ggml_tensor * t) {
        ggml_tensor * a = build(t->src[0]);
        if (!a) return nullptr;
        const Stub * s = find_stub(t->src[1]);
        ggml_tensor * bias = !s || s->kind != Stub::BIAS ? nullptr : s->projection == UP ? in_.bias_up : in_.bias_gate;
        if (!bias) return refuse(std::string("the graph adds '") + t->src[1]->name + "', which is not an expert bias of this model");
        return copy_op(t, a, bias, in_.ids);
    }

    // Two values of the experts' width, or one and a scale for each row.
    ggml_tensor * combined(const ggml_tensor * t) {
        if (!t->src[1]) return refuse(std::string("unknown activation '") + ggml_op_desc(t) + "' in one piece");
        ggml_tensor * a = build(t->src[0]);
        if (!a) return nullptr;
        const ggml_tensor * scale = t->op == GGML_OP_MUL && t->src[1]->op == GGML_OP_GET_ROWS ? scale_behind(t->src[1]) : nullptr;
        ggml_tensor * b = scale ? row_scale(scale) : build(t->src[1]);
        return b ? copy_op(t, a, b, nullptr) : nullptr;
    }

    ggml_tensor * row_scale(const ggml_tensor * scale) {
        ggml_tensor * values = ggml_new_tensor_3d(ctx_, GGML_TYPE_F32, 1, 1, in_.ids->ne[1]);
        in_.row_scales.emplace_back(values, static_cast<const float *>(scale->data));
        return values;
    }

    // The same op with the same parameters on inputs of the real width.
    ggml_tensor * copy_op(const ggml_tensor * t, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c) {
        ggml_tensor * r = ggml_new_tensor_3d(ctx_, GGML_TYPE_F32, a->ne[0], a->ne[1], a->ne[2]);
        r->op = t->op;
        memcpy(r->op_params, t->op_params, sizeof(r->op_params));
        r->src[0] = a;
        r->src[1] = b;
        r->src[2] = c;
        return r;
    }

    ggml_tensor * refuse(const std::string & why) {
        if (error_.empty()) error_ = why;
        return nullptr;
    }

    ggml_context * ctx_;
    ActivationInputs & in_;
    std::string & error_;
    std::unordered_map<const ggml_tensor *, ggml_tensor *> built_;
};

void count_tensors(const ggml_tensor * t, std::unordered_set<const ggml_tensor *> & seen) {
    if (t->op == GGML_OP_VIEW) return count_tensors(t->src[0], seen);
    if (!seen.insert(t).second || t->op == GGML_OP_MUL_MAT_ID) return;
    const bool one = t->op != GGML_OP_GLU && t->op != GGML_OP_MUL;
    for (int i = 0; i < (one ? 1 : 2); i++) {
        if (t->src[i] && t->src[i]->op != GGML_OP_GET_ROWS) count_tensors(t->src[i], seen);
    }
}

}  // namespace

ggml_tensor * build_activation(ggml_context * ctx, const ggml_tensor * hidden, ActivationInputs & in, std::string & error) {
    return Builder(ctx, in, error).build(hidden);
}

int count_activation_tensors(const ggml_tensor * hidden) {
    std::unordered_set<const ggml_tensor *> seen;
    count_tensors(hidden, seen);
    int n = static_cast<int>(seen.size());
    for (const ggml_tensor * t : seen) {
        const Stub * s = product_of(t);
        n += s && s->projection == GATE_UP;  // a fused product has twice the width
    }
    return n;
}

}  // namespace moe_edge
