// The decoder with AVX2 and FMA: the loops of decoder_block.h, chosen at run time.
#include "kernels/decoder_block.h"

namespace flextron {

FLEXTRON_DEFINE_DECODER(avx2)

}  // namespace flextron
