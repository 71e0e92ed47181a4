// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * One job of a unit. The pages that it reaches become the backing of the unit's
 * window, a resource that exists for good; a stream of COPY and FILL packets
 * says what is done; the response to SUBMIT_3D is its fence.
 *
 *   begin -> add pages, copy, clear -> submit -> wait -> end
 *
 * All of it happens with the unit's engine held. Nothing here allocates.
 */

#include <linux/slab.h>

#include "mgpu.h"
#include "mirrorgpu_job.h"

#define MGPU_STREAM_WORDS \
	(MGPU_WINDOW_PAGES * max(MIRRORGPU_JOB_COPY_WORDS, MIRRORGPU_JOB_FILL_WORDS))

int mgpu_job_alloc(struct mgpu_unit *unit)
{
	struct mgpu_job *job = &unit->job;

	job->unit = unit;
	INIT_LIST_HEAD(&job->node);
	job->attach = mgpu_command_alloc(
		sizeof(struct virtio_gpu_resource_attach_backing) +
		MGPU_WINDOW_PAGES * sizeof(struct virtio_gpu_mem_entry));
	job->submit = mgpu_command_alloc(sizeof(struct virtio_gpu_cmd_submit) +
					 MGPU_STREAM_WORDS * sizeof(u32));
	job->detach = mgpu_command_alloc(
		sizeof(struct virtio_gpu_resource_detach_backing));
	return job->attach && job->submit && job->detach ? 0 : -ENOMEM;
}

void mgpu_job_free(struct mgpu_unit *unit)
{
	kfree(unit->job.attach);
	kfree(unit->job.submit);
	kfree(unit->job.detach);
}

static struct virtio_gpu_mem_entry *mgpu_job_entries(struct mgpu_job *job)
{
	return (void *)job->attach->request +
	       sizeof(struct virtio_gpu_resource_attach_backing);
}

struct mgpu_job *mgpu_job_begin(struct mgpu_unit *unit)
{
	struct mgpu_job *job = &unit->job;

	lockdep_assert_held(&unit->engine);
	if (job->left) {
		job->left = false;
		mgpu_job_end(job, mgpu_job_wait(job));
	}
	job->entries = 0;
	job->window_bytes = 0;
	job->last = NULL;
	job->as = NULL;
	job->overtaken = false;
	job->submit->length = sizeof(struct virtio_gpu_cmd_submit);
	return job;
}

/* Puts a page behind the window, and returns where in the window it is. */
u64 mgpu_job_add_page(struct mgpu_job *job, dma_addr_t address)
{
	struct virtio_gpu_mem_entry *entry = mgpu_job_entries(job);
	u64 at = job->window_bytes;

	job->window_bytes += PAGE_SIZE;
	if (job->entries) {
		entry += job->entries - 1;
		if (le64_to_cpu(entry->addr) + le32_to_cpu(entry->length) ==
		    address) {
			le32_add_cpu(&entry->length, PAGE_SIZE);
			return at;
		}
		entry++;
	}
	job->entries++;
	entry->addr = cpu_to_le64(address);
	entry->length = cpu_to_le32(PAGE_SIZE);
	entry->padding = 0;
	return at;
}

static u32 *mgpu_job_next_packet(struct mgpu_job *job, size_t words)
{
	u32 *packet = (void *)job->submit->request + job->submit->length;

	job->submit->length += words * sizeof(u32);
	return packet;
}

/* Whether a page at these places goes on where the last packet ends. */
static bool mgpu_job_continues(struct mgpu_job *job, enum mgpu_space from,
			       u64 from_at, enum mgpu_space to, u64 to_at)
{
	return job->last && job->last_spaces[0] == from &&
	       job->last_spaces[1] == to &&
	       job->last_from + job->last_bytes == from_at &&
	       job->last_to + job->last_bytes == to_at;
}

/* Copies a page. */
void mgpu_job_copy(struct mgpu_job *job, enum mgpu_space from, u64 from_at,
		   enum mgpu_space to, u64 to_at)
{
	struct mirrorgpu_job_copy copy;

	if (!mgpu_job_continues(job, from, from_at, to, to_at)) {
		job->last = mgpu_job_next_packet(job, MIRRORGPU_JOB_COPY_WORDS);
		job->last_from = from_at;
		job->last_to = to_at;
		job->last_bytes = 0;
		job->last_spaces[0] = from;
		job->last_spaces[1] = to;
	}
	job->last_bytes += PAGE_SIZE;
	copy = (struct mirrorgpu_job_copy){
		.from.space = mgpu_unit_resource(job->unit, from),
		.from.address = job->last_from,
		.from.length = job->last_bytes,
		.to.space = mgpu_unit_resource(job->unit, to),
		.to.address = job->last_to,
	};
	mirrorgpu_job_put_copy(job->last, &copy);
}

/* Fills a page with zeros. */
void mgpu_job_clear(struct mgpu_job *job, enum mgpu_space space, u64 at)
{
	struct mirrorgpu_job_fill fill = {
		.to.space = mgpu_unit_resource(job->unit, space),
		.to.address = at,
		.to.length = PAGE_SIZE,
	};

	job->last = NULL;
	mirrorgpu_job_put_fill(mgpu_job_next_packet(job, MIRRORGPU_JOB_FILL_WORDS),
			       &fill);
}

/*
 * Copies mapped pages of a process, by its own addresses, from the start of the
 * staging buffer if they are written, else to there.
 */
void mgpu_job_copy_mapped(struct mgpu_job *job, struct mgpu_as *as,
			  unsigned long first, unsigned long count, bool write)
{
	u32 process = MIRRORGPU_JOB_ADDRESS_SPACE(as->id);
	u32 staging = mgpu_unit_resource(job->unit, MGPU_SPACE_STAGING);
	u64 address = (u64)first << PAGE_SHIFT;
	struct mirrorgpu_job_copy copy = {
		.from.space = write ? staging : process,
		.from.address = write ? 0 : address,
		.from.length = (u64)count << PAGE_SHIFT,
		.to.space = write ? process : staging,
		.to.address = write ? address : 0,
	};

	job->as = as;
	job->last = NULL;
	mirrorgpu_job_put_copy(mgpu_job_next_packet(job, MIRRORGPU_JOB_COPY_WORDS),
			       &copy);
}

static int mgpu_job_queue_attach(struct mgpu_job *job)
{
	struct virtio_gpu_resource_attach_backing *attach;

	attach = mgpu_command_begin(job->attach,
				    VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING, 0,
				    sizeof(*attach));
	attach->resource_id = cpu_to_le32(
		mgpu_unit_resource(job->unit, MGPU_SPACE_WINDOW));
	attach->nr_entries = cpu_to_le32(job->entries);
	job->attach->length +=
		job->entries * sizeof(struct virtio_gpu_mem_entry);
	return mgpu_command_queue(job->unit->device, job->attach);
}

static int mgpu_job_queue_submit(struct mgpu_job *job)
{
	size_t bytes = job->submit->length - sizeof(struct virtio_gpu_cmd_submit);
	struct virtio_gpu_cmd_submit *submit;

	submit = mgpu_command_begin(job->submit, VIRTIO_GPU_CMD_SUBMIT_3D,
				    job->as ? job->as->id : job->unit->index + 1,
				    sizeof(*submit));
	submit->hdr.flags = cpu_to_le32(VIRTIO_GPU_FLAG_FENCE);
	submit->size = cpu_to_le32(bytes);
	job->submit->length += bytes;
	return mgpu_command_queue(job->unit->device, job->submit);
}

/* Gives the job to the device. It uses its pages until it has been waited for. */
int mgpu_job_submit(struct mgpu_job *job)
{
	int ret;

	if (job->entries) {
		ret = mgpu_job_queue_attach(job);
		if (ret)
			return ret;
	}
	return mgpu_job_queue_submit(job);
}

/*
 * Waits for the fence. A job from which pages were taken away fails when it gets
 * there, or has used them before: it may do either.
 */
int mgpu_job_wait(struct mgpu_job *job)
{
	struct mgpu_device *device = job->unit->device;
	int ret = mgpu_command_await(device, job->submit);

	if (ret == -EIO && READ_ONCE(job->overtaken))
		return -EAGAIN;
	return ret == -EIO ? mgpu_command_wait(device, job->submit) : ret;
}

static int mgpu_job_detach(struct mgpu_job *job)
{
	struct virtio_gpu_resource_detach_backing *detach;
	struct mgpu_device *device = job->unit->device;
	int ret;

	detach = mgpu_command_begin(job->detach,
				    VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING, 0,
				    sizeof(*detach));
	detach->resource_id = cpu_to_le32(
		mgpu_unit_resource(job->unit, MGPU_SPACE_WINDOW));
	ret = mgpu_command_queue(device, job->detach);
	return ret ?: mgpu_command_wait(device, job->detach);
}

/*
 * Takes the pages out of the window. @result is what the job came to; a job
 * that failed has cost its context, which is made again.
 */
int mgpu_job_end(struct mgpu_job *job, int result)
{
	int attached = 0, detached = 0;

	if (job->entries)
		attached = mgpu_command_wait(job->unit->device, job->attach);
	if (job->entries && !attached && !mgpu_bug(MGPU_BUG_KEEP_BACKING))
		detached = mgpu_job_detach(job);
	if (result && job->as)
		mgpu_as_renew(job->as);
	else if (result)
		mgpu_unit_renew_context(job->unit);
	return result ?: attached ?: detached;
}
