/* Calls stat(2) and getdents(2) on its arguments as a 32-bit program built without _FILE_OFFSET_BITS=64. Node numbers
   of 2^32 and above give EOVERFLOW. Prints a line per failure.

   Build: gcc -m32 -nostdlib -static -o fs32 fs32.c; needs no 32-bit C library. */

enum { SYS_exit = 1, SYS_write = 4, SYS_open = 5, SYS_close = 6, SYS_stat = 106, SYS_getdents = 141 };
enum { O_DIRECTORY = 0200000 };

static char buffer[65536];

static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}

static void print(const char *text)
{
    int length = 0;
    while (text[length])
        length++;
    call(SYS_write, 1, (long)text, length);
}

static int report(const char *what, const char *path)
{
    print(what);
    print(" ");
    print(path);
    print("\n");
    return 1;
}

int run(long *stack)
{
    int failed = 0;
    char **paths = (char **)(stack + 1);
    for (int i = 1; i < stack[0]; i++) {
        if (call(SYS_stat, (long)paths[i], (long)buffer, 0) != 0)
            failed = report("stat", paths[i]);
        long dir = call(SYS_open, (long)paths[i], O_DIRECTORY, 0), read = 0;
        if (dir < 0)
            continue;
        while ((read = call(SYS_getdents, dir, (long)buffer, sizeof buffer)) > 0)
            ;
        if (read < 0)
            failed = report("getdents", paths[i]);
        call(SYS_close, dir, 0, 0);
    }
    return failed;
}

__asm__(".globl _start\n"
        "_start:\n"
        "  mov %esp, %eax\n"
        "  push %eax\n"
        "  call run\n"
        "  mov %eax, %ebx\n"
        "  mov $1, %eax\n"
        "  int $0x80\n");
