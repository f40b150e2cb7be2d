/* calls.c: what programs do between their loops: they follow pointers and call functions.
 *
 * A binary tree (built and searched, recursively walked), a linked list (reversed, sorted by merging), objects of three
 * kinds behind pointers to functions, and the plain recursion of Fibonacci's numbers. bench/by_hand.py is the same work
 * in Python; both give the same number.
 */

typedef unsigned char u8;
typedef unsigned int u32;

/* The functions whose calls are the point stay functions. (And recursion is not made into a loop: see the Makefile.) */
#define CALLED __attribute__((noinline)) static

enum { TREE_SIZE = 512, LIST_SIZE = 512, FIGURES = 128, GROWTHS = 8, FIBONACCI = 15 };

/* --- Memory and numbers ------------------------------------------------------------------------------------------- */

static u8 heap[65536];
static u32 heap_used; /* a bump allocator: nothing is given back but all at once */
static u32 seed;

static void *allocate(u32 size)
{
    void *place = heap + heap_used;
    heap_used += size;
    return place;
}

/* A linear congruential generator, the one that C's rand() was described with. */
static u32 next_random(void)
{
    seed = seed * 1103515245 + 12345;
    return seed >> 8;
}

/* --- A binary tree ------------------------------------------------------------------------------------------------ */

struct tree {
    u32 key;
    struct tree *left, *right;
};

CALLED struct tree *insert(struct tree *tree, u32 key)
{
    if (!tree) {
        tree = allocate(sizeof *tree);
        tree->key = key;
        tree->left = tree->right = 0;
    } else if (key < tree->key) {
        tree->left = insert(tree->left, key);
    } else if (key > tree->key) {
        tree->right = insert(tree->right, key);
    }
    return tree;
}

CALLED int contains(const struct tree *tree, u32 key)
{
    while (tree && tree->key != key)
        tree = key < tree->key ? tree->left : tree->right;
    return tree != 0;
}

/* A sum that depends on the order, from the smallest key to the greatest. */
CALLED u32 sum_in_order(const struct tree *tree, u32 sum)
{
    if (!tree)
        return sum;
    sum = sum_in_order(tree->left, sum);
    return sum_in_order(tree->right, sum * 31 + tree->key);
}

/* TREE_SIZE keys go in; twice as many are looked for, of which every other one is there. */
static u32 grow_and_search(void)
{
    struct tree *tree = 0;
    u32 found = 0, first = seed;
    for (u32 i = 0; i < TREE_SIZE; i++)
        tree = insert(tree, next_random());
    seed = first;
    for (u32 i = 0; i < TREE_SIZE; i++) {
        u32 key = next_random();
        found += contains(tree, key);
        found += contains(tree, key ^ 1 << 23);
    }
    return sum_in_order(tree, found);
}

/* --- A linked list ------------------------------------------------------------------------------------------------ */

struct link {
    u32 value;
    struct link *next;
};

CALLED struct link *reverse(struct link *list)
{
    struct link *reversed = 0;
    while (list) {
        struct link *next = list->next;
        list->next = reversed;
        reversed = list;
        list = next;
    }
    return reversed;
}

CALLED struct link *merge(struct link *a, struct link *b)
{
    struct link head, *last = &head;
    while (a && b) {
        if (b->value < a->value) {
            last->next = b;
            b = b->next;
        } else {
            last->next = a;
            a = a->next;
        }
        last = last->next;
    }
    last->next = a ? a : b;
    return head.next;
}

/* Sorts by merging: two halves, each sorted by itself. */
CALLED struct link *sort(struct link *list)
{
    if (!list || !list->next)
        return list;
    struct link *middle = list;
    for (struct link *end = list->next; end && end->next; end = end->next->next)
        middle = middle->next;
    struct link *second = middle->next;
    middle->next = 0;
    return merge(sort(list), sort(second));
}

static u32 reverse_and_sort(void)
{
    struct link *list = 0;
    for (u32 i = 0; i < LIST_SIZE; i++) {
        struct link *link = allocate(sizeof *link);
        link->value = next_random();
        link->next = list;
        list = link;
    }
    u32 sum = 0;
    for (struct link *link = sort(reverse(list)); link; link = link->next)
        sum = sum * 31 + link->value;
    return sum;
}

/* --- Objects ------------------------------------------------------------------------------------------------------ */

struct figure {
    const struct kind *kind; /* what C++ calls the table of virtual functions */
    u32 width, height;
};

struct kind {
    u32 (*area)(const struct figure *);
    void (*grow)(struct figure *, u32 by);
};

static u32 rectangle_area(const struct figure *figure)
{
    return figure->width * figure->height;
}

static u32 triangle_area(const struct figure *figure)
{
    return figure->width * figure->height / 2;
}

static u32 square_area(const struct figure *figure)
{
    return figure->width * figure->width;
}

static void grow_both(struct figure *figure, u32 by)
{
    figure->width += by;
    figure->height += by;
}

static void grow_side(struct figure *figure, u32 by)
{
    figure->width += by;
}

static const struct kind kinds[] = {
    {rectangle_area, grow_both},
    {triangle_area, grow_both},
    {square_area, grow_side},
};

static u32 grow_and_measure(void)
{
    struct figure *figures[FIGURES];
    for (u32 i = 0; i < FIGURES; i++) {
        struct figure *figure = figures[i] = allocate(sizeof *figure);
        figure->kind = &kinds[i % 3];
        figure->width = next_random() & 0xFF;
        figure->height = next_random() & 0xFF;
    }
    u32 sum = 0;
    for (u32 by = 0; by < GROWTHS; by++)
        for (u32 i = 0; i < FIGURES; i++) {
            figures[i]->kind->grow(figures[i], by);
            sum += figures[i]->kind->area(figures[i]);
        }
    return sum;
}

/* --- Plain recursion ---------------------------------------------------------------------------------------------- */

CALLED u32 fibonacci(u32 n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

u32 calls(u32 rounds)
{
    u32 result = 0;
    seed = 12345;
    while (rounds--) {
        heap_used = 0;
        result += grow_and_search();
        result ^= reverse_and_sort();
        result += grow_and_measure();
        result ^= fibonacci(FIBONACCI);
    }
    return result;
}
