/* Matrix products in bfloat16 on AMX tiles (tiles.h), summed in float, for weights as they lie in memory. */
#include <stdlib.h>
#include <unistd.h>

#include "tiles.h"

#ifdef TUNESMITH_TILES
#include <sys/syscall.h>

/* Linux lends the tiles' registers only to processes that ask. */
int ts_has_amx(void) {
    static int had = -1;
    if (had < 0) had = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return had;
}
#else
int ts_has_amx(void) { return 0; }
#endif

void *ts_scratch(size_t bytes) {
    static __thread struct {
        void *at;
        size_t bytes;
    } held;
    if (held.bytes < bytes) {
        free(held.at);
        held.bytes = posix_memalign(&held.at, 64, bytes) ? 0 : bytes;
    }
    return held.bytes ? held.at : NULL;
}
