// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/* The parameter that seeds a bug. */

#include <linux/module.h>
#include <linux/string.h>

#include "bug.h"

#define MGPU_BUG_NAME(name, text)	text,
static const char * const mgpu_bug_names[] = {
	MGPU_BUGS(MGPU_BUG_NAME)
};

enum mgpu_bug mgpu_seeded_bug;

static int mgpu_bug_set(const char *value, const struct kernel_param *param)
{
	int bug = sysfs_match_string(mgpu_bug_names, value);

	if (bug < 0)
		return bug;
	mgpu_seeded_bug = bug;
	return 0;
}

static int mgpu_bug_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%s\n", mgpu_bug_names[mgpu_seeded_bug]);
}

static const struct kernel_param_ops mgpu_bug_ops = {
	.set = mgpu_bug_set,
	.get = mgpu_bug_get,
};

module_param_cb(bug, &mgpu_bug_ops, NULL, 0644);
MODULE_PARM_DESC(bug, "Seeded bug of the driver, by its name in README.md (default: none)");
