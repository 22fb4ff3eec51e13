// Kernels of the CPU provider.
#pragma once

#include <memory>
#include <string>
#include <tuple>

#include "custom_op.h"
#include "run.h"

namespace nmexport {

// A session's settings, from the entries of its configuration.
struct SessionSettings {
    std::size_t threads;
    bool hugePages;  // weights are copied into them

    friend bool operator<(const SessionSettings& a, const SessionSettings& b) {
        return std::tie(a.threads, a.hugePages) < std::tie(b.threads, b.hugePages);
    }
};

// Runs as a node of the graph, or as one of a region's.
class CpuKernel : public Kernel {
  public:
    CpuKernel(const OrtApi& api, std::size_t threads) : mApi(api), mThreads(threads) {}
    void run(OrtKernelContext* context) const final { compute(OrtRun(mApi, context, mThreads)); }
    // Throws Fault where inputs do not fit each other.
    virtual void compute(const Run& run) const = 0;

  private:
    const OrtApi& mApi;
    std::size_t mThreads;
};

std::unique_ptr<CpuKernel> makePruneKernel(const NodeInfo& node, ElementType type,
                                           const SessionSettings& settings);
std::unique_ptr<CpuKernel> makeLinearKernel(const NodeInfo& node, ElementType type,
                                            StoredTypes stored, const SessionSettings& settings);
std::unique_ptr<CpuKernel> makeRegionKernel(const NodeInfo& node, const SessionSettings& settings);

// A node of a region, in float32. Throws Fault where the op is none that regions have.
std::unique_ptr<CpuKernel> makeCpuKernel(const std::string& op, const NodeInfo& node,
                                         const SessionSettings& settings);

}  // namespace nmexport
