/* Plugin for QEMU's user-mode emulation of aarch64: counts the instructions that the emulated program executes.
 *
 * Build: gcc -O2 -shared -fPIC -o count_instructions.so count_instructions.c
 * Use:   qemu-aarch64 -plugin ./count_instructions.so,counts=counts.jsonl PROGRAM
 *
 * The program marks a point with the system call getpriority, which changes nothing. At each mark the plugin appends
 * one line of JSON to the file: the mark's number and how many instructions of each class were executed since the
 * program's start. All threads are counted together, without locks: keep to one thread.
 *
 * Debian ships no header for plugins, so the few functions used are declared here, as in include/qemu/qemu-plugin.h of
 * QEMU 5 to 8 (plugin interface version 1). QEMU 9 replaced the inline counters and refuses this version.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define VISIBLE __attribute__((visibility("default")))
#define GETPRIORITY 141 /* its number on aarch64, from include/uapi/asm-generic/unistd.h of Linux */

typedef uint64_t plugin_id;
struct qemu_plugin_tb; /* a translation block: instructions that are always executed together */
struct qemu_plugin_insn;
enum { QEMU_PLUGIN_INLINE_ADD_U64 };

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t index);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *instruction);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *target,
                                              uint64_t value);
void qemu_plugin_register_vcpu_syscall_cb(
    plugin_id id, void (*callback)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                   uint64_t, uint64_t, uint64_t));

VISIBLE int qemu_plugin_version = 1;

enum class { SIMD, MEMORY, BRANCH, INTEGER, OTHER, CLASSES };
static const char *const names[CLASSES] = {"simd", "memory", "branch", "integer", "other"};
static uint64_t executed[CLASSES];
static FILE *output;

/* Bits 28 to 25 select the group: Arm Architecture Reference Manual (DDI 0487), "A64 instruction set encoding". Loads
 * and stores of vector registers are in the group of loads and stores. */
static enum class classify(uint32_t instruction)
{
    static const enum class groups[16] = {
        OTHER,   OTHER,   OTHER,  OTHER,  /* 00xx: reserved, SME, unallocated, SVE */
        MEMORY,  INTEGER, MEMORY, SIMD,   /* 01xx */
        INTEGER, INTEGER, BRANCH, BRANCH, /* 100x: immediate operands; 101x: branches and system instructions */
        MEMORY,  INTEGER, MEMORY, SIMD,   /* 11xx */
    };
    return groups[(instruction >> 25) & 15];
}

/* A block was translated: each execution of it will add its number of instructions to every class's counter. */
static void on_translation(plugin_id id, struct qemu_plugin_tb *block)
{
    uint64_t instructions[CLASSES] = {0};
    for (size_t index = 0; index < qemu_plugin_tb_n_insns(block); index++) {
        uint32_t instruction;
        memcpy(&instruction, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, index)), sizeof instruction);
        instructions[classify(instruction)]++;
    }
    for (int class = 0; class < CLASSES; class++)
        if (instructions[class])
            qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &executed[class],
                                                     instructions[class]);
}

static void on_system_call(plugin_id id, unsigned processor, int64_t number, uint64_t a1, uint64_t a2,
                           uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    static int marks;
    if (number != GETPRIORITY)
        return;
    fprintf(output, "{\"mark\": %d", marks++);
    for (int class = 0; class < CLASSES; class++)
        fprintf(output, ", \"%s\": %" PRIu64, names[class], executed[class]);
    fprintf(output, "}\n");
    fflush(output);
}

VISIBLE int qemu_plugin_install(plugin_id id, const void *information, int arguments, char **values)
{
    if (arguments != 1 || strncmp(values[0], "counts=", 7)) {
        fprintf(stderr, "count_instructions.so: give exactly one argument, counts=PATH\n");
        return 1;
    }
    output = fopen(values[0] + 7, "w");
    if (!output) {
        perror(values[0] + 7);
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
    return 0;
}
