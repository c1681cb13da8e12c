// route on the CPU.
#include "kernels/route.h"

namespace flextron {

template <class scalar_t>
void route_choices_cpu(const RouteParams<scalar_t>& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) p.choice[t] = route_choice(p, t);
}

template <class scalar_t>
void route_order_cpu(const RouteParams<scalar_t>& p) {
  // offsets[i + 1] is bucket i's cursor while the tokens are placed; it ends where bucket i + 1 begins.
  for (int64_t i = 0; i <= p.C; ++i) p.offsets[i] = 0;
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t bucket = p.C - 1 - p.choice[t];
    if (bucket + 2 <= p.C) ++p.offsets[bucket + 2];
  }
  for (int64_t i = 2; i <= p.C; ++i) p.offsets[i] += p.offsets[i - 1];
  for (int64_t t = 0; t < p.T; ++t) p.order[p.offsets[p.C - p.choice[t]]++] = t;
}

template void route_choices_cpu(const RouteParams<float>&, int64_t, int64_t);
template void route_choices_cpu(const RouteParams<double>&, int64_t, int64_t);
template void route_order_cpu(const RouteParams<float>&);
template void route_order_cpu(const RouteParams<double>&);

}  // namespace flextron
