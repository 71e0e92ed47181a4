// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Commands on the control queue, and the units: a context each, with the
 * resources that its jobs name. Knows nothing of processes and their pages.
 */

#include <linux/dma-mapping.h>
#include <linux/slab.h>

#include "mgpu.h"
#include "mirrorgpu_job.h"

/* Longer than any job of ours on any host; then the device is given up. */
#define MGPU_ANSWER_TIMEOUT	(60 * HZ)

struct mgpu_command *mgpu_command_alloc(size_t room)
{
	struct mgpu_command *command;

	command = kzalloc(struct_size(command, request, room), GFP_KERNEL);
	if (command) {
		command->room = room;
		init_completion(&command->done);
	}
	return command;
}

/* Writes the header, and returns the request. What follows @size is kept. */
void *mgpu_command_begin(struct mgpu_command *command, u32 type, u32 context,
			 size_t size)
{
	struct virtio_gpu_ctrl_hdr *header = (void *)command->request;

	memset(command->request, 0, size);
	memset(&command->response, 0, sizeof(command->response));
	header->type = cpu_to_le32(type);
	header->ctx_id = cpu_to_le32(context);
	command->length = size;
	return command->request;
}

/* Puts the command into the ring. It is the device's until it is done. */
int mgpu_command_queue(struct mgpu_device *device, struct mgpu_command *command)
{
	struct virtio_gpu_ctrl_hdr *header = (void *)command->request;
	struct scatterlist request, response, *lists[] = { &request, &response };
	unsigned long flags;
	int ret;

	if (WARN_ON_ONCE(command->length > command->room))
		return -EINVAL;
	sg_init_one(&request, command->request, command->length);
	sg_init_one(&response, &command->response, sizeof(command->response));
	reinit_completion(&command->done);

	spin_lock_irqsave(&device->queue_lock, flags);
	if (device->broken) {
		ret = -ENODEV;
	} else {
		if (header->flags & cpu_to_le32(VIRTIO_GPU_FLAG_FENCE))
			header->fence_id = cpu_to_le64(++device->fence);
		ret = virtqueue_add_sgs(device->queue, lists, 1, 1, command,
					GFP_ATOMIC);
		if (!ret)
			virtqueue_kick(device->queue);
	}
	spin_unlock_irqrestore(&device->queue_lock, flags);
	/* A caller that waits for it must not wait for ever. */
	if (ret)
		complete_all(&command->done);
	return ret;
}

/* Waits for the response, and says what it means. */
int mgpu_command_await(struct mgpu_device *device, struct mgpu_command *command)
{
	struct virtio_gpu_ctrl_hdr *header = (void *)command->request;

	if (!wait_for_completion_timeout(&command->done, MGPU_ANSWER_TIMEOUT)) {
		dev_err(&device->vdev->dev, "No answer to command 0x%x\n",
			le32_to_cpu(header->type));
		mgpu_device_stop(device);
		return -ETIMEDOUT;
	}
	return command->response.type == cpu_to_le32(VIRTIO_GPU_RESP_OK_NODATA) ?
		       0 : -EIO;
}

/* The same for a command that has no reason to fail. */
int mgpu_command_wait(struct mgpu_device *device, struct mgpu_command *command)
{
	struct virtio_gpu_ctrl_hdr *header = (void *)command->request;
	int ret = mgpu_command_await(device, command);

	if (ret == -EIO)
		dev_err_ratelimited(&device->vdev->dev,
				    "Response 0x%x to command 0x%x\n",
				    le32_to_cpu(command->response.type),
				    le32_to_cpu(header->type));
	return ret;
}

void mgpu_queue_interrupt(struct virtqueue *queue)
{
	struct mgpu_device *device = queue->vdev->priv;
	struct mgpu_command *command;
	unsigned long flags;
	unsigned int length;

	spin_lock_irqsave(&device->queue_lock, flags);
	do {
		virtqueue_disable_cb(queue);
		while ((command = virtqueue_get_buf(queue, &length)))
			complete_all(&command->done);
	} while (!virtqueue_enable_cb(queue));
	spin_unlock_irqrestore(&device->queue_lock, flags);
}

/*
 * Resets the device: it touches no memory any more, and commands without a
 * response are done without one.
 */
void mgpu_device_stop(struct mgpu_device *device)
{
	struct mgpu_command *command;
	unsigned long flags;
	bool first;

	spin_lock_irqsave(&device->queue_lock, flags);
	first = !device->broken;
	device->broken = true;
	spin_unlock_irqrestore(&device->queue_lock, flags);
	if (!first)
		return;
	virtio_reset_device(device->vdev);
	while ((command = virtqueue_detach_unused_buf(device->queue)))
		complete_all(&command->done);
}

u32 mgpu_unit_resource(const struct mgpu_unit *unit, enum mgpu_space space)
{
	return unit->index * MGPU_SPACES + space;
}

/* Writes a command of a header and some words. */
void mgpu_command_words(struct mgpu_command *command, u32 type, u32 context,
			const u32 *words, size_t count)
{
	size_t size = sizeof(struct virtio_gpu_ctrl_hdr) + count * sizeof(u32);
	__le32 *body;
	size_t i;

	body = mgpu_command_begin(command, type, context, size) +
	       sizeof(struct virtio_gpu_ctrl_hdr);
	for (i = 0; i < count; i++)
		body[i] = cpu_to_le32(words[i]);
}

/* Such commands of the unit, one at a time. */
static int mgpu_unit_command(struct mgpu_unit *unit, u32 type, u32 context,
			     const u32 *words, size_t count)
{
	struct mgpu_command *command = unit->job.submit;
	int ret;

	mgpu_command_words(command, type, context, words, count);
	ret = mgpu_command_queue(unit->device, command);
	return ret ?: mgpu_command_wait(unit->device, command);
}

static int mgpu_unit_create_buffer(struct mgpu_unit *unit,
				   enum mgpu_space space, size_t bytes)
{
	/* Target, format and bind of a plain buffer; one of everything else. */
	u32 words[] = { mgpu_unit_resource(unit, space), 0, 64, 16, bytes,
			1, 1, 1, 0, 0, 0, 0 };

	return mgpu_unit_command(unit, VIRTIO_GPU_CMD_RESOURCE_CREATE_3D, 0,
				 words, ARRAY_SIZE(words));
}

/* Makes the context with all resources. Its jobs hold their memory as the device's default mode says. */
static int mgpu_unit_create_context(struct mgpu_unit *unit)
{
	u32 context = unit->index + 1;
	u32 create[18] = {};
	int space, ret;

	ret = mgpu_unit_command(unit, VIRTIO_GPU_CMD_CTX_CREATE, context,
				create, ARRAY_SIZE(create));
	for (space = MGPU_SPACE_WINDOW; space < MGPU_SPACES && !ret; space++) {
		u32 words[] = { mgpu_unit_resource(unit, space), 0 };

		if (space == MGPU_SPACE_LOCAL && !unit->local)
			continue;
		ret = mgpu_unit_command(unit,
					VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE,
					context, words, ARRAY_SIZE(words));
	}
	return ret;
}

/* Makes the context again, which is lost when a job fails. */
void mgpu_unit_renew_context(struct mgpu_unit *unit)
{
	if (unit->device->broken)
		return;
	mgpu_unit_command(unit, VIRTIO_GPU_CMD_CTX_DESTROY, unit->index + 1,
			  NULL, 0);
	mgpu_unit_create_context(unit);
}

static int mgpu_unit_attach(struct mgpu_unit *unit, enum mgpu_space space,
			    const struct mgpu_buffer *blocks,
			    unsigned int count, size_t block_bytes)
{
	struct virtio_gpu_resource_attach_backing *attach;
	struct mgpu_command *command = unit->job.attach;
	struct virtio_gpu_mem_entry *entries;
	unsigned int i;
	int ret;

	attach = mgpu_command_begin(command,
				    VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING, 0,
				    sizeof(*attach));
	command->length += count * sizeof(*entries);
	attach->resource_id = cpu_to_le32(mgpu_unit_resource(unit, space));
	attach->nr_entries = cpu_to_le32(count);
	entries = (void *)(attach + 1);
	for (i = 0; i < count; i++) {
		entries[i].addr = cpu_to_le64(blocks[i].dma);
		entries[i].length = cpu_to_le32(block_bytes);
		entries[i].padding = 0;
	}
	ret = mgpu_command_queue(unit->device, command);
	return ret ?: mgpu_command_wait(unit->device, command);
}

/* Makes a resource of buffers that stay behind it for good. */
int mgpu_unit_create_resource(struct mgpu_unit *unit, enum mgpu_space space,
			      const struct mgpu_buffer *blocks,
			      unsigned int count, size_t block_bytes)
{
	int ret;

	ret = mgpu_unit_create_buffer(unit, space, count * block_bytes);
	return ret ?: mgpu_unit_attach(unit, space, blocks, count, block_bytes);
}

int mgpu_unit_init(struct mgpu_unit *unit)
{
	struct device *dma = unit->device->dma;
	int ret;

	mutex_init(&unit->engine);
	snprintf(unit->name, sizeof(unit->name), "hmm_dmirror%u", unit->index);
	ret = mgpu_job_alloc(unit);
	if (ret)
		return ret;
	unit->staging.cpu = dma_alloc_coherent(dma, MGPU_WINDOW_BYTES,
					       &unit->staging.dma, GFP_KERNEL);
	if (!unit->staging.cpu)
		return -ENOMEM;
	ret = mgpu_unit_create_buffer(unit, MGPU_SPACE_WINDOW,
				      MGPU_WINDOW_BYTES);
	if (ret)
		return ret;
	ret = mgpu_unit_create_resource(unit, MGPU_SPACE_STAGING,
					&unit->staging, 1, MGPU_WINDOW_BYTES);
	if (ret)
		return ret;
	ret = mgpu_local_init(unit);
	return ret ?: mgpu_unit_create_context(unit);
}

/* The device has been reset: it reaches none of this any more. */
void mgpu_unit_fini(struct mgpu_unit *unit)
{
	mgpu_local_fini(unit);
	if (unit->staging.cpu)
		dma_free_coherent(unit->device->dma, MGPU_WINDOW_BYTES,
				  unit->staging.cpu, unit->staging.dma);
	mgpu_job_free(unit);
}
