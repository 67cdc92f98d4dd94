/* AMX: eight tile registers, each up to 16 rows of 64 bytes, and instructions that multiply one by another. */

#if defined __AMX_TILE__ && defined __linux__
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct { /* of the tile registers */
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;

static int has_amx(void) { /* Linux has to be asked once: it reserves room for the registers in each thread's saved state */
    static int answer = -1;
    if (answer < 0) answer = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return answer;
}

/* Registers 0 to 3 are sums, 4 and 5 blocks of height rows of x, 6 and 7 the halves of a panel; deep bytes of a row of x
   make a step. */
static inline void amx_begin(int height, int deep) {
    shapes s = {.palette = 1};
    for (int i = 0; i < 8; i++) s.bytes[i] = i == 4 || i == 5 ? deep : 64, s.rows[i] = i < 6 ? height : deep / 4;
    asm volatile("ldtilecfg %0" ::"m"(s));
}

static inline void amx_end(void) { asm volatile("tilerelease"); }
#else
static inline int has_amx(void) { return 0; }
static inline void amx_begin(int height, int deep) { (void)height, (void)deep; }
static inline void amx_end(void) {}
#endif
