// The decoder with AVX-512 (F, BW, VL, DQ): the loops of decoder_block.h, chosen at run time.
#include "kernels/decoder_block.h"

namespace flextron {

FLEXTRON_DEFINE_DECODER(avx512)

}  // namespace flextron
