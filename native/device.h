// What our two devices have in common: the one beside the CPU (backend.cpp), and the one that ggml's RPC server runs on
// a board (board.cpp). Neither has a buffer type of its own: tensors lie in CPU buffers, and any host buffer will do.
#pragma once
#include <cstring>

#include "ggml_abi.h"

namespace moe_edge {

// What a device answers for itself.
struct DeviceAnswers {
    const char * (*name)(ggml_backend_dev_t);
    const char * (*description)(ggml_backend_dev_t);
    void (*memory)(ggml_backend_dev_t, size_t * free, size_t * total);
    enum ggml_backend_dev_type (*type)(ggml_backend_dev_t);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char *);
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
};

// Fills the table of a device, which belongs to reg. Optional functions stay null: ggml asks for them by that.
inline void fill_device(ggml_backend_device & device, ggml_backend_reg * reg, const DeviceAnswers & answers) {
    auto & table = device.iface;
    table.get_name = answers.name;
    table.get_description = answers.description;
    table.get_memory = answers.memory;
    table.get_type = answers.type;
    table.init_backend = answers.init_backend;
    table.supports_op = answers.supports_op;
    table.get_props = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        memset(props, 0, sizeof(*props));
        props->name = dev->iface.get_name(dev);
        props->description = dev->iface.get_description(dev);
        props->type = dev->iface.get_type(dev);
        dev->iface.get_memory(dev, &props->memory_free, &props->memory_total);
    };
    table.get_buffer_type = [](ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); };
    table.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return ggml_backend_buft_is_host(type); };
    device.reg = reg;
}

// A backend of the device, which owns context from then on: free_backend deletes both.
inline ggml_backend_t new_backend(
    ggml_backend_dev_t device, ggml_guid_t guid, void * context, const char * (*name)(ggml_backend_t),
    void (*free_backend)(ggml_backend_t), enum ggml_status (*compute)(ggml_backend_t, ggml_cgraph *)) {
    auto * backend = new ggml_backend();
    backend->guid = guid;
    backend->iface.get_name = name;
    backend->iface.free = free_backend;
    backend->iface.graph_compute = compute;
    backend->device = device;
    backend->context = context;
    return backend;
}

}  // namespace moe_edge
