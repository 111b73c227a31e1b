// What a me_model of the C interface is, for the files that implement it.
#pragma once
#include "capi.h"
#include "model.h"

struct me_model {
    moe_edge::Model model;
    explicit me_model(const me_model_desc & d) : model(d) {}
};
