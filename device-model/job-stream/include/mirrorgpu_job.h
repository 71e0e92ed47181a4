/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The job stream of MirrorGPU, for guests: see MANUAL.md.
 *
 * Generated from the table of packets. Do not edit:
 * UPDATE_GENERATED=1 cargo test -p job-stream --test generated
 *
 * A stream is built by one mirrorgpu_job_put_*() after the other. Each takes
 * where the next word goes, and gives back where the one after the packet goes.
 * There has to be room: MIRRORGPU_JOB_*_WORDS says how much.
 */
#ifndef MIRRORGPU_JOB_H
#define MIRRORGPU_JOB_H

#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "The words of a job stream are little-endian"
#endif

enum mirrorgpu_job_opcode {
	MIRRORGPU_JOB_NOP = 0x01,
	MIRRORGPU_JOB_BARRIER = 0x02,
	MIRRORGPU_JOB_CONTEXT = 0x03,
	MIRRORGPU_JOB_FILL = 0x10,
	MIRRORGPU_JOB_COPY = 0x11,
	MIRRORGPU_JOB_CHECKSUM = 0x12,
	MIRRORGPU_JOB_SIGNAL = 0x20,
	MIRRORGPU_JOB_WAIT = 0x21,
	MIRRORGPU_JOB_ATOMIC = 0x22,
	MIRRORGPU_JOB_TIMESTAMP = 0x23,
	MIRRORGPU_JOB_SPIN = 0x30,
};

/* What an invalidation means to the jobs of a context. */
enum mirrorgpu_job_mode {
	MIRRORGPU_JOB_MODE_STRICT = 1,
	MIRRORGPU_JOB_MODE_FENCE = 2,
	MIRRORGPU_JOB_MODE_PREEMPT = 3,
	MIRRORGPU_JOB_MODE_FAULT = 4,
	MIRRORGPU_JOB_MODE_REGISTRATION_CACHE = 5,
};

/* Whose turn it is when several contexts have work. */
enum mirrorgpu_job_priority {
	MIRRORGPU_JOB_PRIORITY_LOW = 1,
	MIRRORGPU_JOB_PRIORITY_NORMAL = 2,
	MIRRORGPU_JOB_PRIORITY_HIGH = 3,
};

/* How WAIT compares the value in memory, masked, with the value of the packet. All numbers are unsigned. */
enum mirrorgpu_job_compare {
	MIRRORGPU_JOB_COMPARE_EQ = 1,
	MIRRORGPU_JOB_COMPARE_NE = 2,
	MIRRORGPU_JOB_COMPARE_LT = 3,
	MIRRORGPU_JOB_COMPARE_LE = 4,
	MIRRORGPU_JOB_COMPARE_GT = 5,
	MIRRORGPU_JOB_COMPARE_GE = 6,
};

/* What ATOMIC does. */
enum mirrorgpu_job_atomic_operation {
	MIRRORGPU_JOB_ATOMIC_OPERATION_ADD = 1,
	MIRRORGPU_JOB_ATOMIC_OPERATION_CAS = 2,
};

/* What SPIN does when the engine is wanted for something else. */
enum mirrorgpu_job_spin_behaviour {
	MIRRORGPU_JOB_SPIN_BEHAVIOUR_PREEMPTIBLE = 1,
	MIRRORGPU_JOB_SPIN_BEHAVIOUR_STUBBORN = 2,
	MIRRORGPU_JOB_SPIN_BEHAVIOUR_WEDGED = 3,
};

/*
 * A place in memory: the space is a resource, and the address an offset in it;
 * or it is an address space, and the address one of its own.
 */
struct mirrorgpu_job_at {
	uint32_t space;
	uint64_t address;
};

struct mirrorgpu_job_range {
	uint32_t space;
	uint64_t address;
	uint64_t length;
};

/* The space that the address space with this asid is. */
#define MIRRORGPU_JOB_ADDRESS_SPACE(asid) (0x80000000u | (uint32_t)(asid))

/* The first word of a packet; the length is in words and counts this one. */
#define MIRRORGPU_JOB_HEADER(opcode, flags, length) \
	((uint32_t)(opcode) | (uint32_t)(flags) << 8 | (uint32_t)(length) << 16)

static inline uint32_t *mirrorgpu_job_put_u64(uint32_t *words, uint64_t value)
{
	words[0] = (uint32_t)value;
	words[1] = (uint32_t)(value >> 32);
	return words + 2;
}

static inline uint32_t *mirrorgpu_job_put_at(uint32_t *words, struct mirrorgpu_job_at at)
{
	*words++ = at.space;
	return mirrorgpu_job_put_u64(words, at.address);
}

static inline uint32_t *mirrorgpu_job_put_range(uint32_t *words, struct mirrorgpu_job_range range)
{
	*words++ = range.space;
	words = mirrorgpu_job_put_u64(words, range.address);
	return mirrorgpu_job_put_u64(words, range.length);
}

/* NOP: Does nothing, and takes as many words as its header says. */
#define MIRRORGPU_JOB_NOP_WORDS 1

struct mirrorgpu_job_nop {
	uint32_t flags;
	/* Words that are skipped, 0 to 65534 of them. */
	uint32_t payload;
};

static inline uint32_t *mirrorgpu_job_put_nop(uint32_t *words,
		const struct mirrorgpu_job_nop *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_NOP, packet->flags,
		MIRRORGPU_JOB_NOP_WORDS + packet->payload);
	for (uint32_t i = 0; i < packet->payload; i++)
		*words++ = 0;
	return words;
}

/* BARRIER: Makes everything before it visible before anything behind it begins. */
#define MIRRORGPU_JOB_BARRIER_WORDS 1

struct mirrorgpu_job_barrier {
	uint32_t flags;
};

static inline uint32_t *mirrorgpu_job_put_barrier(uint32_t *words,
		const struct mirrorgpu_job_barrier *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_BARRIER, packet->flags,
		MIRRORGPU_JOB_BARRIER_WORDS);
	return words;
}

/* CONTEXT: Says how the context treats its jobs, and how the end of this job is told. */
#define MIRRORGPU_JOB_CONTEXT_WORDS 10

struct mirrorgpu_job_context {
	uint32_t flags;
	/* What an invalidation means to the jobs of the context; 0: what is settled already, or the device's default. */
	uint32_t mode;
	/* Whose turn it is among contexts, from this job on; 0: as before, at first normal. */
	uint32_t priority;
	/* Where the end of this job is written; space 0: nowhere. */
	struct mirrorgpu_job_at fence;
	/* What is written when all packets have been executed. */
	uint64_t done;
	/* What is written when they have not. */
	uint64_t failed;
};

static inline uint32_t *mirrorgpu_job_put_context(uint32_t *words,
		const struct mirrorgpu_job_context *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_CONTEXT, packet->flags,
		MIRRORGPU_JOB_CONTEXT_WORDS);
	*words++ = packet->mode;
	*words++ = packet->priority;
	words = mirrorgpu_job_put_at(words, packet->fence);
	words = mirrorgpu_job_put_u64(words, packet->done);
	words = mirrorgpu_job_put_u64(words, packet->failed);
	return words;
}

/* FILL: Fills a range with a 32-bit pattern. */
#define MIRRORGPU_JOB_FILL_WORDS 7

struct mirrorgpu_job_fill {
	uint32_t flags;
	/* What is filled. */
	struct mirrorgpu_job_range to;
	/* The word that is written again and again, the first one at the first address. */
	uint32_t pattern;
};

static inline uint32_t *mirrorgpu_job_put_fill(uint32_t *words,
		const struct mirrorgpu_job_fill *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_FILL, packet->flags,
		MIRRORGPU_JOB_FILL_WORDS);
	words = mirrorgpu_job_put_range(words, packet->to);
	*words++ = packet->pattern;
	return words;
}

/* COPY: Copies a range to another place. */
#define MIRRORGPU_JOB_COPY_WORDS 9

struct mirrorgpu_job_copy {
	uint32_t flags;
	/* What is copied. */
	struct mirrorgpu_job_range from;
	/* Where its first byte goes. */
	struct mirrorgpu_job_at to;
};

static inline uint32_t *mirrorgpu_job_put_copy(uint32_t *words,
		const struct mirrorgpu_job_copy *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_COPY, packet->flags,
		MIRRORGPU_JOB_COPY_WORDS);
	words = mirrorgpu_job_put_range(words, packet->from);
	words = mirrorgpu_job_put_at(words, packet->to);
	return words;
}

/* CHECKSUM: Writes the CRC-32C of a range. */
#define MIRRORGPU_JOB_CHECKSUM_WORDS 9

struct mirrorgpu_job_checksum {
	uint32_t flags;
	/* What is read. */
	struct mirrorgpu_job_range from;
	/* Where the 32-bit result goes. */
	struct mirrorgpu_job_at to;
};

static inline uint32_t *mirrorgpu_job_put_checksum(uint32_t *words,
		const struct mirrorgpu_job_checksum *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_CHECKSUM, packet->flags,
		MIRRORGPU_JOB_CHECKSUM_WORDS);
	words = mirrorgpu_job_put_range(words, packet->from);
	words = mirrorgpu_job_put_at(words, packet->to);
	return words;
}

/* SIGNAL: Writes a value, after everything before it is visible (release). */
#define MIRRORGPU_JOB_SIGNAL_WORDS 6
#define MIRRORGPU_JOB_SIGNAL_WIDE (1u << 0) /* The value has 64 bits, not 32. */

struct mirrorgpu_job_signal {
	uint32_t flags;
	/* Where the value goes. */
	struct mirrorgpu_job_at at;
	/* The value. */
	uint64_t value;
};

static inline uint32_t *mirrorgpu_job_put_signal(uint32_t *words,
		const struct mirrorgpu_job_signal *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_SIGNAL, packet->flags,
		MIRRORGPU_JOB_SIGNAL_WORDS);
	words = mirrorgpu_job_put_at(words, packet->at);
	words = mirrorgpu_job_put_u64(words, packet->value);
	return words;
}

/* WAIT: Waits until a value in memory compares (acquire). */
#define MIRRORGPU_JOB_WAIT_WORDS 11
#define MIRRORGPU_JOB_WAIT_WIDE (1u << 0) /* The value has 64 bits, not 32. */

struct mirrorgpu_job_wait {
	uint32_t flags;
	/* Where the value is. */
	struct mirrorgpu_job_at at;
	/* How it is compared. */
	uint32_t compare;
	/* What it is compared with. */
	uint64_t value;
	/* The bits of the value in memory that count. */
	uint64_t mask;
	/* For how many nanoseconds at the most, from the first look on; 0: as long as the device allows. */
	uint64_t timeout;
};

static inline uint32_t *mirrorgpu_job_put_wait(uint32_t *words,
		const struct mirrorgpu_job_wait *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_WAIT, packet->flags,
		MIRRORGPU_JOB_WAIT_WORDS);
	words = mirrorgpu_job_put_at(words, packet->at);
	*words++ = packet->compare;
	words = mirrorgpu_job_put_u64(words, packet->value);
	words = mirrorgpu_job_put_u64(words, packet->mask);
	words = mirrorgpu_job_put_u64(words, packet->timeout);
	return words;
}

/* ATOMIC: Changes a value in one piece (acquire and release). */
#define MIRRORGPU_JOB_ATOMIC_WORDS 12
#define MIRRORGPU_JOB_ATOMIC_WIDE (1u << 0) /* All values have 64 bits, not 32. */

struct mirrorgpu_job_atomic {
	uint32_t flags;
	/* What is done. */
	uint32_t operation;
	/* Where the value is. */
	struct mirrorgpu_job_at at;
	/* What is added, or what the new value is. */
	uint64_t operand;
	/* With `cas`, what the value in memory has to be. */
	uint64_t expected;
	/* Where the old value goes; space 0: nowhere. */
	struct mirrorgpu_job_at old;
};

static inline uint32_t *mirrorgpu_job_put_atomic(uint32_t *words,
		const struct mirrorgpu_job_atomic *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_ATOMIC, packet->flags,
		MIRRORGPU_JOB_ATOMIC_WORDS);
	*words++ = packet->operation;
	words = mirrorgpu_job_put_at(words, packet->at);
	words = mirrorgpu_job_put_u64(words, packet->operand);
	words = mirrorgpu_job_put_u64(words, packet->expected);
	words = mirrorgpu_job_put_at(words, packet->old);
	return words;
}

/* TIMESTAMP: Writes the device's time. */
#define MIRRORGPU_JOB_TIMESTAMP_WORDS 4

struct mirrorgpu_job_timestamp {
	uint32_t flags;
	/* Where the time goes, in 64 bits. */
	struct mirrorgpu_job_at at;
};

static inline uint32_t *mirrorgpu_job_put_timestamp(uint32_t *words,
		const struct mirrorgpu_job_timestamp *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_TIMESTAMP, packet->flags,
		MIRRORGPU_JOB_TIMESTAMP_WORDS);
	words = mirrorgpu_job_put_at(words, packet->at);
	return words;
}

/* SPIN: Holds the engine for a time, without touching memory. */
#define MIRRORGPU_JOB_SPIN_WORDS 4

struct mirrorgpu_job_spin {
	uint32_t flags;
	/* What it does when the engine is wanted for something else. */
	uint32_t behaviour;
	/* For how many nanoseconds. */
	uint64_t duration;
};

static inline uint32_t *mirrorgpu_job_put_spin(uint32_t *words,
		const struct mirrorgpu_job_spin *packet)
{
	*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_SPIN, packet->flags,
		MIRRORGPU_JOB_SPIN_WORDS);
	*words++ = packet->behaviour;
	words = mirrorgpu_job_put_u64(words, packet->duration);
	return words;
}

/* AS_CREATE: Creates an address space of the context. */
#define MIRRORGPU_CMD_AS_CREATE 0x4d00u

struct mirrorgpu_as_create {
	/* The number of the address space, below 0x80000000. */
	uint32_t asid;
	/* FAULTS (bit 0): the driver answers faults. Else 0. */
	uint32_t flags;
	/* The IOVA of the root table: a multiple of 4096, below 2^52. */
	uint64_t root;
};

/* AS_DESTROY: Ends an address space of the context. */
#define MIRRORGPU_CMD_AS_DESTROY 0x4d01u

struct mirrorgpu_as_destroy {
	/* The address space. */
	uint32_t asid;
	/* Ignored. */
	uint32_t padding;
};

/* AS_INVALIDATE: Makes the device forget translations of an address space. */
#define MIRRORGPU_CMD_AS_INVALIDATE 0x4d02u

struct mirrorgpu_as_invalidate {
	/* The address space. */
	uint32_t asid;
	/* LEAVES (bit 0): only leaves have changed, and the device may keep what it knows of tables. Else 0. */
	uint32_t flags;
	/* The first Gva of the range. */
	uint64_t first;
	/* The last Gva of the range, below 2^48. The range is grown to whole pages. */
	uint64_t last;
};

/* AS_FETCH_FAULT: Asks for the next fault of an address space that was created with FAULTS. */
#define MIRRORGPU_CMD_AS_FETCH_FAULT 0x4d03u

struct mirrorgpu_as_fetch_fault {
	/* The address space. */
	uint32_t asid;
	/* Ignored. */
	uint32_t padding;
};

/* AS_ANSWER_FAULT: Answers a fault that AS_FETCH_FAULT has brought. */
#define MIRRORGPU_CMD_AS_ANSWER_FAULT 0x4d04u

struct mirrorgpu_as_answer_fault {
	/* The address space. */
	uint32_t asid;
	/* 0: REPLAY. 1: FAIL. */
	uint32_t action;
	/* The number of the fault. */
	uint64_t id;
};

/* AS_FAULT: A fault that the driver has to answer. */
#define MIRRORGPU_RESP_AS_FAULT 0x4d80u

struct mirrorgpu_as_fault {
	/* The number of the fault, for AS_ANSWER_FAULT. No other fault of the device has it. */
	uint64_t id;
	/* The address space. */
	uint32_t asid;
	/* What the packet does: 1 reads, 2 writes, 3 both in one piece (ATOMIC). */
	uint32_t access;
	/* The address. */
	uint64_t gva;
	/* The entry that ended the walk; of level 0, or a leaf, if the access is not permitted by it. */
	uint64_t pte;
	/* The level of that entry. */
	uint32_t level;
	/* 0: nothing is mapped there. 1: the leaf does not permit the access. */
	uint32_t denied;
	/* The packet of the job, counted from 0. */
	uint32_t packet;
	/* How often the job has raised a fault for this page and this access before, in turn. */
	uint32_t repeats;
};

/* Addresses of an address space have 48 bits; the bits of its page-table entries. */
#define MIRRORGPU_GVA_BITS 48
/* flags of AS_CREATE and AS_INVALIDATE, actions of AS_ANSWER_FAULT */
#define MIRRORGPU_AS_CREATE_FAULTS 1u
#define MIRRORGPU_AS_INVALIDATE_LEAVES 1u
#define MIRRORGPU_AS_FAULT_REPLAY 0u
#define MIRRORGPU_AS_FAULT_FAIL 1u
#define MIRRORGPU_PTE_VALID 0x1ull
#define MIRRORGPU_PTE_READ 0x2ull
#define MIRRORGPU_PTE_WRITE 0x4ull
#define MIRRORGPU_PTE_ATOMIC 0x8ull
#define MIRRORGPU_PTE_NULL 0x20ull
#define MIRRORGPU_PTE_LEAF 0x40ull
#define MIRRORGPU_PTE_IOVA 0xffffffffff000ull
#define MIRRORGPU_PTE_SOFTWARE 0x7f0000000000000ull

/* The capability set. */
#define MIRRORGPU_JOB_CAPSET_ID 30
#define MIRRORGPU_JOB_CAPSET_VERSION 2
#define MIRRORGPU_JOB_CAPSET_BYTES 104

struct mirrorgpu_job_capset {
	/* Version of this layout, from 1 up. A later version only appends fields. */
	uint32_t version;
	/* Bytes of the capability set: 96 in version 1, 104 in version 2. */
	uint32_t size;
	/* Engines that execute jobs at the same time. */
	uint32_t engines;
	/* Modes that a context can have: bit n is the mode with the number n. */
	uint32_t modes;
	/* The mode of a context that asks for none. */
	uint32_t default_mode;
	/* Words of a stream, at the most. */
	uint32_t max_words;
	/* Packets of a stream, at the most. */
	uint32_t max_packets;
	/* Jobs of all contexts that may be submitted and not yet done, at the most. */
	uint32_t max_jobs;
	/* Packets that the device executes: bit n of the 256 is the packet with the opcode n. */
	uint32_t packets[8];
	/* Bytes of an operand, at the most. */
	uint64_t max_operand;
	/* Nanoseconds of a SPIN, at the most. */
	uint64_t max_spin;
	/* Nanoseconds of a WAIT, at the most; what a timeout of 0 means. */
	uint64_t max_wait;
	/* Nanoseconds for which the device bears a SPIN that is wedged, or any job that will not leave, when it is asked to leave. */
	uint64_t max_wedge;
	/* Address spaces of all contexts, at the most; 0: the device has none. From version 2 on. */
	uint32_t max_address_spaces;
	/* Bits of an address in an address space. From version 2 on. */
	uint32_t gva_bits;
};

#endif /* MIRRORGPU_JOB_H */
