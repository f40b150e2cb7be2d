/*
 * init: the first and only program of the Linux guest, process 1. A small shell on the serial line.
 *
 * It is written without a C library, so that nothing stands between it and the kernel: a program asks the kernel by
 * the instruction SYSCALL and by nothing else. It uses no floating point, of which the machine has none.
 *
 * From top to bottom: system calls; strings and numbers; output; the commands, one function each; the shell.
 */

/* ---- System calls --------------------------------------------------------------------------------------------------
 *
 * The number of the call goes in RAX, what it is to work on in RDI, RSI, RDX, R10, R8 and R9. The answer comes back in
 * RAX; -1 to -4095 is the number of an error. The processor itself overwrites RCX and R11: it keeps RIP and RFLAGS
 * there. (System V ABI for AMD64, A.2.1. Numbers and constants are those of Linux on x86-64.)
 */

typedef unsigned long size_t;

enum { READ = 0, WRITE = 1, OPEN = 2, CLOSE = 3, LSTAT = 6, MMAP = 9, DUP2 = 33, FORK = 57, EXIT = 60, WAIT4 = 61,
       FSYNC = 74, SYSINFO = 99, SYNC = 162, MOUNT = 165, UMOUNT2 = 166, REBOOT = 169, GETDENTS64 = 217 };

static long syscall(long number, long a, long b, long c, long d, long e)
{
    long result;
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = 0;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

enum { O_RDONLY = 0, O_WRONLY = 1, O_CREAT = 0100, O_TRUNC = 01000, O_DIRECTORY = 0200000 };

static long open(const char *path, int flags) { return syscall(OPEN, (long)path, flags, 0644, 0, 0); }
static long close(long file) { return syscall(CLOSE, file, 0, 0, 0, 0); }
static long read(long file, void *data, size_t size) { return syscall(READ, file, (long)data, size, 0, 0); }
static void exit(int status) { syscall(EXIT, status, 0, 0, 0, 0); }
static long fork(void) { return syscall(FORK, 0, 0, 0, 0, 0); }
static long wait_for_any(int *status) { return syscall(WAIT4, -1, (long)status, 0, 0, 0); }

enum { MS_RDONLY = 1 };

static long mount(const char *device, const char *directory, const char *type, long flags)
{
    return syscall(MOUNT, (long)device, (long)directory, (long)type, flags, 0);
}

/* Writes all of it: the kernel may take less at a time. */
static long write(long file, const void *data, size_t size)
{
    size_t done = 0;
    while (done < size) {
        long written = syscall(WRITE, file, (long)data + done, size - done, 0, 0);
        if (written < 0)
            return written;
        done += written;
    }
    return done;
}

/* ---- Strings and numbers ---- */

static size_t length(const char *text)
{
    size_t size = 0;
    while (text[size])
        size++;
    return size;
}

static int equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static int is_digit(char c) { return '0' <= c && c <= '9'; }

/* A number, as 512, 64K or 2M; -1 if it is none. */
static long number(const char *text)
{
    long value = 0;
    if (!is_digit(*text))
        return -1;
    while (is_digit(*text))
        value = value * 10 + *text++ - '0';
    if (*text == 'K')
        value <<= 10, text++;
    else if (*text == 'M')
        value <<= 20, text++;
    return *text ? -1 : value;
}

/* ---- Output: gathered, for a system call costs much more than a letter ---- */

static char gathered[512];
static size_t gathered_size;

static void flush(void)
{
    write(1, gathered, gathered_size);
    gathered_size = 0;
}

static void put(const char *text)
{
    while (*text) {
        if (gathered_size == sizeof gathered)
            flush();
        gathered[gathered_size++] = *text++;
    }
}

/* A number in base 10 or 16, on at least `width` places. */
static void put_number(unsigned long value, unsigned base, int width, char padding)
{
    char digits[24], *place = digits + sizeof digits;
    *--place = 0;
    do {
        *--place = "0123456789abcdef"[value % base];
        value /= base;
        width--;
    } while (value);
    while (width-- > 0)
        *--place = padding;
    put(place);
}

static void put_decimal(unsigned long value) { put_number(value, 10, 1, ' '); }

/* "COMMAND: THING: what went wrong". Returns 1, which a command ends with when it failed. */
static int complain(const char *command, const char *thing, long error)
{
    static const struct { int number; const char *text; } ERRORS[] = {
        { 1, "this is not permitted" }, { 2, "there is no such file or directory" }, { 5, "the device failed" },
        { 6, "there is no such device" }, { 11, "there are too many processes" },
        { 12, "there is not enough memory" }, { 15, "this is no disk" },
        { 16, "it is in use" }, { 19, "there is no such device" }, { 20, "this is no directory" },
        { 21, "this is a directory" }, { 22, "this is not possible here" }, { 28, "there is no space left" },
        { 30, "it can only be read" },
    };
    put(command);
    put(": ");
    put(thing);
    put(": ");
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].number == -error) {
            put(ERRORS[i].text);
            put("\n");
            return 1;
        }
    put("error ");
    put_decimal(-error);
    put("\n");
    return 1;
}

/* ---- Commands: each gets its words, of which the first is its name and the last is followed by 0 ---- */

static char block[4096] __attribute__((aligned(8)));  /* a page: what a command reads or writes at once */

/* A word that must be a number. If it is none, says so and returns 0. */
static int take_number(char **words, int which, long *value)
{
    *value = number(words[which]);
    if (*value < 0) {
        put(words[0]);
        put(": ");
        put(words[which]);
        put(": this is no number (as 512, 64K or 2M)\n");
    }
    return *value >= 0;
}

static int echo(char **words)
{
    while (*++words) {
        put(*words);
        if (words[1])
            put(" ");
    }
    put("\n");
    return 0;
}

static int cat(char **words)
{
    int failed = 0;
    for (char **path = words + 1; *path; path++) {
        long file = open(*path, O_RDONLY), size = file;
        while (file >= 0 && (size = read(file, block, sizeof block)) > 0)
            write(1, block, size);
        if (size < 0)
            failed = complain(words[0], *path, size);
        close(file);
    }
    return failed;
}

/* What a directory is read as: entries of different sizes, each of which says where the next one is. */
struct entry {
    unsigned long inode, next;
    unsigned short size;
    unsigned char type;
    char name[];
};

/* Calls `use` for every entry of a directory; returns 0 or an error. */
static long for_each_entry(const char *path, void (*use)(const char *directory, struct entry *))
{
    long directory = open(path, O_RDONLY | O_DIRECTORY), size = directory;
    while (directory >= 0 && (size = syscall(GETDENTS64, directory, (long)block, sizeof block, 0, 0)) > 0)
        for (long at = 0; at < size; at += ((struct entry *)(block + at))->size)
            use(path, (struct entry *)(block + at));
    close(directory);
    return size;
}

/* DIRECTORY/NAME or DIRECTORY/NAME/FILE, until the next call. */
static const char *join(const char *directory, const char *name, const char *file)
{
    static char path[512];
    const char *parts[] = { directory, "/", name, file ? "/" : "", file ? file : "" };
    size_t size = 0;
    for (int i = 0; i < 5; i++)
        for (const char *from = parts[i]; *from && size < sizeof path - 1; from++)
            path[size++] = *from;
    path[size] = 0;
    return path;
}

struct stat {
    unsigned long device, inode, links;
    unsigned mode, user, group, padding;
    unsigned long special_device;
    long size, block_size, blocks;
    unsigned long times[6];
    long unused[3];
};

/* The kind of a file, in the upper four bits of its mode, and as `ls` shows it. */
static const char KINDS[16] = "?pc?d?b?-?l?s???";

static void list_entry(const char *directory, struct entry *entry)
{
    struct stat stat;
    char kind[] = "? ";
    if (entry->name[0] == '.' || syscall(LSTAT, (long)join(directory, entry->name, 0), (long)&stat, 0, 0, 0) < 0)
        return;
    kind[0] = KINDS[stat.mode >> 12 & 15];
    put(kind);
    put_number(stat.size, 10, 9, ' ');
    put(" ");
    put(entry->name);
    put("\n");
}

static int ls(char **words)
{
    const char *path = words[1] ? words[1] : "/";
    long error = for_each_entry(path, list_entry);
    return error < 0 ? complain(words[0], path, error) : 0;
}

/* One line of `ps`. /proc/PID/stat begins with: PID (NAME) STATE PARENT ... */
static void list_process(const char *directory, struct entry *entry)
{
    static char text[512];
    long file, size, end, parent;
    if (!is_digit(entry->name[0]) || (file = open(join(directory, entry->name, "stat"), O_RDONLY)) < 0)
        return;
    size = read(file, text, sizeof text - 1);
    close(file);
    for (end = size - 1; end > 0 && text[end] != ')'; end--)
        ;
    if (end <= 0)
        return;
    text[end] = text[end + 3] = 0;
    for (parent = end + 4; is_digit(text[parent]); parent++)
        ;
    text[parent] = 0;
    put_number(number(entry->name), 10, 5, ' ');
    put_number(number(text + end + 4), 10, 7, ' ');
    put("  ");
    put(text + end + 2);
    put("      ");
    put(text + length(entry->name) + 2);
    put("\n");
}

static int ps(char **words)
{
    put("  PID PARENT STATE  NAME\n");
    long error = for_each_entry("/proc", list_process);
    return error < 0 ? complain(words[0], "/proc", error) : 0;
}

static int uptime(char **words)
{
    struct {
        long seconds;
        unsigned long loads[3], memory, free_memory, shared, buffers, swap, free_swap;
        unsigned short processes, padding;
        unsigned long high[2];
        unsigned unit;
    } info;
    (void)words;
    syscall(SYSINFO, (long)&info, 0, 0, 0, 0);
    put("up ");
    put_decimal(info.seconds);
    put(" s, ");
    put_decimal(info.processes);
    put(" processes, ");
    put_decimal(info.free_memory * info.unit >> 10);
    put(" of ");
    put_decimal(info.memory * info.unit >> 10);
    put(" KB free\n");
    return 0;
}

/* A disk that can only be read appears all the same, and so do its files. */
static int mount_disk(char **words)
{
    enum { PERMISSION_DENIED = -13 };
    long error = mount(words[1], words[2], "ext2", 0);
    if (error == PERMISSION_DENIED)
        error = mount(words[1], words[2], "ext2", MS_RDONLY);
    return error < 0 ? complain(words[0], words[1], error) : 0;
}

static int unmount(char **words)
{
    long error = syscall(UMOUNT2, (long)words[1], 0, 0, 0, 0);
    return error < 0 ? complain(words[0], words[1], error) : 0;
}

/* The checksum of `write` and `sum`: FNV-1a, but of 64 bits at a time, the last of them filled up with zeros. */
static unsigned long add_block(unsigned long sum, size_t size)
{
    while (size % 8)
        block[size++] = 0;
    for (size_t at = 0; at < size; at += 8)
        sum = (sum ^ *(unsigned long *)(block + at)) * 0x100000001b3;
    return sum;
}

static const unsigned long CHECKSUM_OF_NOTHING = 0xcbf29ce484222325;

static void put_checksum(size_t size, unsigned long sum)
{
    put_decimal(size);
    put(" bytes, sum ");
    put_number(sum, 16, 16, '0');
    put("\n");
}

/* write PATH SIZE SEED: numbers that look random and follow from the seed (Marsaglia's xorshift64). */
static int write_random(char **words)
{
    long size, seed, file, error, done = 0;
    unsigned long random, sum = CHECKSUM_OF_NOTHING;
    if (!take_number(words, 2, &size) || !take_number(words, 3, &seed))
        return 1;
    file = open(words[1], O_WRONLY | O_CREAT | O_TRUNC);
    if (file < 0)
        return complain(words[0], words[1], file);
    random = seed + CHECKSUM_OF_NOTHING;
    while (done < size) {
        long part = size - done < (long)sizeof block ? size - done : (long)sizeof block;
        for (size_t i = 0; i < sizeof block; i += 8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *(unsigned long *)(block + i) = random;
        }
        error = write(file, block, part);
        if (error < 0)
            return complain(words[0], words[1], error);
        sum = add_block(sum, part);
        done += part;
    }
    error = syscall(FSYNC, file, 0, 0, 0, 0);
    if (error < 0)
        return complain(words[0], words[1], error);
    put_checksum(done, sum);
    return 0;
}

/* sum PATH [SIZE]: of a file, or of the beginning of a disk. */
static int sum_up(char **words)
{
    long limit = 1L << 62, done = 0, size, file;
    unsigned long sum = CHECKSUM_OF_NOTHING;
    if (words[2] && !take_number(words, 2, &limit))
        return 1;
    file = open(words[1], O_RDONLY);
    if (file < 0)
        return complain(words[0], words[1], file);
    while (done < limit) {
        size = limit - done < (long)sizeof block ? limit - done : (long)sizeof block;
        size = read(file, block, size);
        if (size < 0)
            return complain(words[0], words[1], size);
        if (size == 0)
            break;
        sum = add_block(sum, size);
        done += size;
    }
    put_checksum(done, sum);
    return 0;
}

/* stress-mem MB: fill that much memory with numbers that differ from place to place, and look whether they stay. */
static int stress_memory(char **words)
{
    enum { STEP = 256, READ_WRITE = 3, PRIVATE_ANONYMOUS = 0x22 };
    long size, wrong = 0;
    char *memory;
    if (!take_number(words, 1, &size))
        return 1;
    size <<= 20;
    memory = (char *)syscall(MMAP, 0, size, READ_WRITE, PRIVATE_ANONYMOUS, -1);
    if ((long)memory < 0 && (long)memory > -4096)
        return complain(words[0], words[1], (long)memory);
    for (long at = 0; at < size; at += STEP)
        *(volatile long *)(memory + at) = at * 0x9e3779b97f4a7c15;
    for (long at = 0; at < size; at += STEP)
        wrong += *(volatile long *)(memory + at) != at * (long)0x9e3779b97f4a7c15;
    put_decimal(size / sizeof block);
    put(" pages written and read, ");
    put_decimal(wrong);
    put(" numbers were wrong\n");
    return wrong != 0;
}

/* stress-fork N: so many processes at once. Each changes a variable, which the others must not see. */
static int stress_fork(char **words)
{
    static volatile long mine = -1;
    long count, started, error = 0, expected = 0, sum = 0;
    int status;
    if (!take_number(words, 1, &count))
        return 1;
    for (started = 0; started < count; started++) {
        long child = fork();
        if (child < 0) {
            error = child;
            break;
        }
        if (child == 0) {
            status = mine == -1 ? started % 100 : 255;
            mine = started;
            exit(status);
        }
        expected += started % 100;
    }
    for (long ended = 0; ended < started; ended++) {
        wait_for_any(&status);
        sum += status >> 8;
    }
    if (error)
        complain(words[0], words[1], error);
    put_decimal(started);
    put(sum == expected ? " processes started and ended\n" : " processes, and some ended wrongly\n");
    return error || sum != expected;
}

static int sync(char **words)
{
    (void)words;
    return syscall(SYNC, 0, 0, 0, 0, 0);
}

/* The ways to stop. The two magic numbers keep a wild program from doing it by accident. */
static int stop(char **words, long how)
{
    flush();
    syscall(SYNC, 0, 0, 0, 0, 0);
    return complain(words[0], "the kernel", syscall(REBOOT, 0xfee1dead, 672274793, how, 0, 0));
}

static int power_off(char **words) { return stop(words, 0x4321fedc); }
static int halt(char **words) { return stop(words, 0xcdef0123); }
static int reboot(char **words) { return stop(words, 0x01234567); }

static int help(char **words);

/* ---- The shell ---- */

static const struct command {
    const char *name, *arguments, *meaning;
    int fewest, most;  /* so many arguments */
    int (*run)(char **words);
} COMMANDS[] = {
    { "cat", "FILE...", "shows files", 1, 99, cat },
    { "echo", "TEXT", "says it again", 0, 99, echo },
    { "halt", "", "stops the processor", 0, 0, halt },
    { "help", "", "shows this", 0, 0, help },
    { "ls", "[DIRECTORY]", "shows what is in it: kind, size, name", 0, 1, ls },
    { "mount", "DISK DIRECTORY", "lets a disk with the file system ext2 appear there", 2, 2, mount_disk },
    { "poweroff", "", "ends", 0, 0, power_off },
    { "ps", "", "shows the processes", 0, 0, ps },
    { "reboot", "", "starts again", 0, 0, reboot },
    { "stress-fork", "COUNT", "starts so many processes at once", 1, 1, stress_fork },
    { "stress-mem", "MB", "fills so much memory, and checks it", 1, 1, stress_memory },
    { "sum", "FILE [SIZE]", "adds a file or a disk up", 1, 2, sum_up },
    { "sync", "", "writes to the disks what is not there yet", 0, 0, sync },
    { "umount", "DIRECTORY", "takes the disk away from there", 1, 1, unmount },
    { "uptime", "", "shows for how long the system runs, and its memory", 0, 0, uptime },
    { "write", "FILE SIZE SEED", "fills a file or a disk with numbers that follow from the seed", 3, 3, write_random },
};

enum { COMMAND_COUNT = sizeof COMMANDS / sizeof *COMMANDS, MOST_WORDS = 100 };

static int help(char **words)
{
    (void)words;
    for (const struct command *command = COMMANDS; command < COMMANDS + COMMAND_COUNT; command++) {
        size_t size = length(command->name) + 1 + length(command->arguments);
        put(command->name);
        put(" ");
        put(command->arguments);
        for (; size < 24; size++)
            put(" ");
        put(command->meaning);
        put("\n");
    }
    put("COMMAND ... > FILE      writes to a file what would be shown\n");
    return 0;
}

/* Takes "> FILE" out of the words, and lets everything that is written go there. Returns whether that worked. */
static int redirect(char **words)
{
    for (char **word = words; *word; word++)
        if (**word == '>') {
            const char *path = (*word)[1] ? *word + 1 : word[1];
            long file = open(path ? path : "", O_WRONLY | O_CREAT | O_TRUNC);
            if (file < 0)
                return complain(">", path ? path : "(no name)", file), 0;
            syscall(DUP2, file, 1, 0, 0, 0);
            *word = 0;
            return 1;
        }
    return 1;
}

static int run_command(char **words)
{
    int arguments = 0;
    if (!redirect(words))
        return 1;
    while (words[0] && words[arguments + 1])
        arguments++;
    for (const struct command *command = COMMANDS; command < COMMANDS + COMMAND_COUNT; command++)
        if (words[0] && equal(words[0], command->name)) {
            if (command->fewest <= arguments && arguments <= command->most)
                return command->run(words);
            put("write it as: ");
            put(command->name);
            put(" ");
            put(command->arguments);
            put("\n");
            return 1;
        }
    put("there is no command ");
    put(words[0] ? words[0] : ">");
    put(": type help for a list\n");
    return 1;
}

/* Runs a line in a process of its own: if it goes wrong, the shell goes on. */
static void run_line(char *line)
{
    char *words[MOST_WORDS + 1];
    int count = 0, status;
    for (char *at = line; *at;) {
        while (*at == ' ' || *at == '\n')
            *at++ = 0;
        if (*at && count < MOST_WORDS)
            words[count++] = at;
        while (*at && *at != ' ' && *at != '\n')
            at++;
    }
    words[count] = 0;
    if (!count)
        return;
    long child = fork();
    if (child == 0) {
        status = run_command(words);
        flush();
        exit(status);
    }
    if (child < 0)
        complain("init", words[0], child);
    while (child > 0 && wait_for_any(&status) != child)
        ;
    if (child > 0 && status & 0x7f) {
        put("the command was killed by signal ");
        put_decimal(status & 0x7f);
        put("\n");
    }
}

__attribute__((used)) static void run(void)
{
    static char line[256];
    static const char *const FILE_SYSTEMS[] = { "proc", "/proc", "devtmpfs", "/dev" };
    for (int i = 0; i < 4; i += 2) {
        long error = mount(FILE_SYSTEMS[i], FILE_SYSTEMS[i + 1], FILE_SYSTEMS[i], 0);
        if (error < 0)
            complain("init", FILE_SYSTEMS[i + 1], error);
    }
    put("Linux guest: type help for a list of commands\n");
    for (;;) {
        put("# ");
        flush();
        long size = read(0, line, sizeof line - 1);  /* the kernel's terminal hands out a line at a time */
        if (size > 0) {
            line[size] = 0;
            run_line(line);
        }
    }
}

/* Where the kernel enters. The ABI wants a stack that is a multiple of 16 before the CALL. */
__asm__(".globl _start\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    and $-16, %rsp\n"
        "    call run\n");
