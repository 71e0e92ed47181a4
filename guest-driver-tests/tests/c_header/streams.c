/*
 * Job streams that are built with the header alone, as a driver in C builds them. The first argument names one; its
 * words go to the standard output.
 *
 * Buffers 1, 2 and 3 are the spaces. What each stream must leave in them stands in main.rs, computed by itself.
 */
#include <mirrorgpu_job.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What is done to memory, once by each packet that does something to it. */
static uint32_t *memory(uint32_t *next)
{
	next = mirrorgpu_job_put_context(next, &(struct mirrorgpu_job_context){
		.fence = { 3, 0x1000 }, .done = 0x0123456789abcdefull, .failed = 0xfedcba9876543210ull });
	next = mirrorgpu_job_put_nop(next, &(struct mirrorgpu_job_nop){ .payload = 5 });
	next = mirrorgpu_job_put_fill(next, &(struct mirrorgpu_job_fill){
		.to = { 1, 0x0ff4, 0x2010 }, .pattern = 0x04030201u });
	next = mirrorgpu_job_put_barrier(next, &(struct mirrorgpu_job_barrier){ 0 });
	next = mirrorgpu_job_put_copy(next, &(struct mirrorgpu_job_copy){
		.from = { 1, 0x0f01, 0x21235 }, .to = { 2, 0x0803 } });
	next = mirrorgpu_job_put_checksum(next, &(struct mirrorgpu_job_checksum){
		.from = { 2, 3, 0x3effd }, .to = { 3, 0x40 } });
	next = mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){
		.at = { 3, 0x48 }, .value = 0x01020304u });
	next = mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){
		.flags = MIRRORGPU_JOB_SIGNAL_WIDE, .at = { 3, 0x50 }, .value = 0x1112131415161718ull });
	next = mirrorgpu_job_put_atomic(next, &(struct mirrorgpu_job_atomic){
		.operation = MIRRORGPU_JOB_ATOMIC_OPERATION_ADD, .at = { 3, 0x48 }, .operand = 0xfffffffeu,
		.old = { 3, 0x4c } });
	next = mirrorgpu_job_put_atomic(next, &(struct mirrorgpu_job_atomic){
		.flags = MIRRORGPU_JOB_ATOMIC_WIDE, .operation = MIRRORGPU_JOB_ATOMIC_OPERATION_ADD,
		.at = { 3, 0x50 }, .operand = 0x0f00000000000001ull, .old = { 3, 0x58 } });
	/* This one finds what it expects, the next one does not. */
	next = mirrorgpu_job_put_atomic(next, &(struct mirrorgpu_job_atomic){
		.operation = MIRRORGPU_JOB_ATOMIC_OPERATION_CAS, .at = { 3, 0x48 }, .operand = 0xaabbccddu,
		.expected = 0x01020302u, .old = { 3, 0x60 } });
	next = mirrorgpu_job_put_atomic(next, &(struct mirrorgpu_job_atomic){
		.flags = MIRRORGPU_JOB_ATOMIC_WIDE, .operation = MIRRORGPU_JOB_ATOMIC_OPERATION_CAS,
		.at = { 3, 0x50 }, .operand = 99, .expected = 0x1112131415161718ull, .old = { 3, 0x68 } });
	next = mirrorgpu_job_put_timestamp(next, &(struct mirrorgpu_job_timestamp){ .at = { 3, 0x70 } });
	next = mirrorgpu_job_put_spin(next, &(struct mirrorgpu_job_spin){
		.behaviour = MIRRORGPU_JOB_SPIN_BEHAVIOUR_PREEMPTIBLE, .duration = 3000000 });
	return mirrorgpu_job_put_timestamp(next, &(struct mirrorgpu_job_timestamp){ .at = { 3, 0x78 } });
}

/* One comparison of the word at 0x80, which is 5, that must hold; a mark behind it. */
static uint32_t *compares(uint32_t *next, uint32_t compare, uint64_t value, uint64_t mark)
{
	next = mirrorgpu_job_put_wait(next, &(struct mirrorgpu_job_wait){
		.at = { 3, 0x80 }, .compare = compare, .value = value, .mask = 0xffffffffu });
	return mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){ .at = { 3, 0x88 }, .value = mark });
}

static uint32_t *comparisons(uint32_t *next)
{
	next = mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){ .at = { 3, 0x80 }, .value = 5 });
	next = compares(next, MIRRORGPU_JOB_COMPARE_EQ, 5, 1);
	next = compares(next, MIRRORGPU_JOB_COMPARE_NE, 4, 2);
	next = compares(next, MIRRORGPU_JOB_COMPARE_NE, 6, 3);
	next = compares(next, MIRRORGPU_JOB_COMPARE_LT, 6, 4);
	next = compares(next, MIRRORGPU_JOB_COMPARE_LE, 5, 5);
	next = compares(next, MIRRORGPU_JOB_COMPARE_LE, 6, 6);
	next = compares(next, MIRRORGPU_JOB_COMPARE_GT, 4, 7);
	next = compares(next, MIRRORGPU_JOB_COMPARE_GE, 5, 8);
	return compares(next, MIRRORGPU_JOB_COMPARE_GE, 4, 9);
}

/* Waits until the guest's processor has written 5 into the second byte, whatever is in the others. */
static uint32_t *waits(uint32_t *next)
{
	next = mirrorgpu_job_put_wait(next, &(struct mirrorgpu_job_wait){
		.at = { 3, 0x90 }, .compare = MIRRORGPU_JOB_COMPARE_EQ, .value = 0x0500, .mask = 0xff00 });
	return mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){ .at = { 3, 0x98 }, .value = 7 });
}

/* Waits for a value of 64 bits that never comes. */
static uint32_t *times_out(uint32_t *next)
{
	next = mirrorgpu_job_put_context(next, &(struct mirrorgpu_job_context){
		.fence = { 3, 0x1000 }, .done = 0x0123456789abcdefull, .failed = 0xfedcba9876543210ull });
	next = mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){ .at = { 3, 0xa0 }, .value = 1 });
	next = mirrorgpu_job_put_wait(next, &(struct mirrorgpu_job_wait){
		.flags = MIRRORGPU_JOB_WAIT_WIDE, .at = { 3, 0xa8 }, .compare = MIRRORGPU_JOB_COMPARE_EQ,
		.value = 0x8000000000000000ull, .mask = ~0ull, .timeout = 2000000 });
	return mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){ .at = { 3, 0xa0 }, .value = 2 });
}

/* Says that it begins, holds its engine, and says that it is over. */
static uint32_t *spins(uint32_t *next, uint32_t behaviour, uint64_t duration)
{
	next = mirrorgpu_job_put_timestamp(next, &(struct mirrorgpu_job_timestamp){ .at = { 3, 0xc0 } });
	next = mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){ .at = { 3, 0xb0 }, .value = 1 });
	next = mirrorgpu_job_put_spin(next, &(struct mirrorgpu_job_spin){
		.behaviour = behaviour, .duration = duration });
	return mirrorgpu_job_put_signal(next, &(struct mirrorgpu_job_signal){ .at = { 3, 0xb0 }, .value = 2 });
}

static uint32_t *tells_the_time(uint32_t *next)
{
	return mirrorgpu_job_put_timestamp(next, &(struct mirrorgpu_job_timestamp){ .at = { 3, 0xd0 } });
}

static uint32_t *settles(uint32_t *next, uint32_t mode, uint32_t priority)
{
	return mirrorgpu_job_put_context(next, &(struct mirrorgpu_job_context){ .mode = mode, .priority = priority });
}

/* Prints the fields of the capability set that comes in. */
static int capset(void)
{
	struct mirrorgpu_job_capset set;

	if (fread(&set, sizeof(set), 1, stdin) != 1)
		return EXIT_FAILURE;
	printf("version %u\nsize %u\nengines %u\nmodes %#x\ndefault_mode %u\n",
		set.version, set.size, set.engines, set.modes, set.default_mode);
	printf("max_words %u\nmax_packets %u\nmax_jobs %u\n", set.max_words, set.max_packets, set.max_jobs);
	for (size_t i = 0; i < 8; i++)
		printf("packets[%zu] %#x\n", i, set.packets[i]);
	printf("max_operand %llu\nmax_spin %llu\nmax_wait %llu\nmax_wedge %llu\n",
		(unsigned long long)set.max_operand, (unsigned long long)set.max_spin,
		(unsigned long long)set.max_wait, (unsigned long long)set.max_wedge);
	printf("max_address_spaces %u\ngva_bits %u\n", set.max_address_spaces, set.gva_bits);
	return EXIT_SUCCESS;
}

#define IS(name) (strcmp(which, name) == 0)

int main(int count, char **arguments)
{
	uint32_t words[1024], *end = NULL;
	const char *which = count > 1 ? arguments[1] : "";

	if (IS("capset"))
		return capset();
	if (IS("memory"))
		end = memory(words);
	else if (IS("comparisons"))
		end = comparisons(words);
	else if (IS("waits"))
		end = waits(words);
	else if (IS("times-out"))
		end = times_out(words);
	else if (IS("spins-preemptible"))
		end = spins(words, MIRRORGPU_JOB_SPIN_BEHAVIOUR_PREEMPTIBLE, 9000000000ull);
	else if (IS("spins-stubborn"))
		end = spins(words, MIRRORGPU_JOB_SPIN_BEHAVIOUR_STUBBORN, 200000000);
	else if (IS("spins-wedged"))
		end = spins(words, MIRRORGPU_JOB_SPIN_BEHAVIOUR_WEDGED, 0);
	else if (IS("time"))
		end = tells_the_time(words);
	else if (IS("strict"))
		end = settles(words, MIRRORGPU_JOB_MODE_STRICT, MIRRORGPU_JOB_PRIORITY_LOW);
	else if (IS("fence"))
		end = settles(words, MIRRORGPU_JOB_MODE_FENCE, MIRRORGPU_JOB_PRIORITY_NORMAL);
	else if (IS("preempt"))
		end = settles(words, MIRRORGPU_JOB_MODE_PREEMPT, MIRRORGPU_JOB_PRIORITY_HIGH);
	else if (IS("fault"))
		end = settles(words, MIRRORGPU_JOB_MODE_FAULT, 0);
	else if (IS("registration-cache"))
		end = settles(words, MIRRORGPU_JOB_MODE_REGISTRATION_CACHE, 0);
	if (end == NULL)
		return EXIT_FAILURE;
	return fwrite(words, sizeof(words[0]), (size_t)(end - words), stdout) == (size_t)(end - words)
		? EXIT_SUCCESS : EXIT_FAILURE;
}
