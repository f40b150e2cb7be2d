/*
 * What the review leaves in bhyvectl(8): a message for a VM, sent and not waited for.
 *
 *     review_client SOCKET checkpoint|suspend FILE
 *
 * Written from the declarations that the review describes, and from nothing of mini-bhyve: the two must agree. It
 * binds no address, so it is not answered. Exit status 0 means that the message was sent, not that it was obeyed.
 */
#include <sys/types.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MAX_SNAPSHOT_FILENAME 1024 /* PATH_MAX of FreeBSD; Linux has another one */

enum ipc_opcode {
	START_CHECKPOINT,
	START_SUSPEND,
};

struct checkpoint_op {
	char snapshot_filename[MAX_SNAPSHOT_FILENAME];
};

struct ipc_message {
	enum ipc_opcode code;
	union {
		struct checkpoint_op op;
	} data;
};

static int
send_message(const char *path, const void *data, size_t len)
{
	struct sockaddr_un addr;
	int s, sent;

	if (strlen(path) >= sizeof(addr.sun_path)) {
		fprintf(stderr, "%s: too long for a socket\n", path);
		return (-1);
	}
	memset(&addr, 0, sizeof(addr));
	addr.sun_family = AF_UNIX;
	strcpy(addr.sun_path, path);

	s = socket(AF_UNIX, SOCK_DGRAM, 0);
	if (s < 0) {
		perror("socket");
		return (-1);
	}
	sent = sendto(s, data, len, 0, (struct sockaddr *)&addr, sizeof(addr)) == (ssize_t)len;
	if (!sent)
		perror(path);
	close(s);
	return (sent ? 0 : -1);
}

static int
snapshot_request(const char *path, const char *file, enum ipc_opcode code)
{
	struct ipc_message message;

	memset(&message, 0, sizeof(message));
	message.code = code;
	snprintf(message.data.op.snapshot_filename, MAX_SNAPSHOT_FILENAME, "%s", file);
	return (send_message(path, &message, sizeof(message)));
}

int
main(int argc, char *argv[])
{
	enum ipc_opcode code;

	if (argc == 4 && strcmp(argv[2], "checkpoint") == 0)
		code = START_CHECKPOINT;
	else if (argc == 4 && strcmp(argv[2], "suspend") == 0)
		code = START_SUSPEND;
	else {
		fprintf(stderr, "usage: %s SOCKET checkpoint|suspend FILE\n", argv[0]);
		return (1);
	}
	return (snapshot_request(argv[1], argv[3], code) == 0 ? 0 : 1);
}
